//! The parked records of a source partition, as a holder knows them.

use std::sync::Arc;

/// Offsets of records that an owner has gone past and not handed over, ascending. Mostly empty.
#[derive(Clone, Debug, Default)]
pub(super) struct ParkedOffsets(pub(super) Vec<i64>);

impl ParkedOffsets {
    pub(super) fn contains(&self, offset: &i64) -> bool {
        self.0.binary_search(offset).is_ok()
    }

    /// -1 if there are none.
    pub(super) fn highest(&self) -> i64 {
        self.0.last().copied().unwrap_or(-1)
    }

    pub(super) fn remove(&mut self, offset: i64) {
        if let Ok(index) = self.0.binary_search(&offset) {
            self.0.remove(index);
        }
    }

    /// An owner that routes `offset` names these parked ones before it. Returns whether all of them are parked here:
    /// one that is not above `highest`, and was not parked before, has passed.
    pub(super) fn name_below(&mut self, offset: i64, named: &[i64], highest: i64) -> bool {
        let below = self.0.partition_point(|parked| *parked < offset);
        // Almost always: there can be a thousand, and each record names them.
        if self.0[..below] == *named {
            return true;
        }
        let mut known = self.0[..below].iter().peekable();
        let mut parked = Vec::with_capacity(named.len());
        parked.extend(named.iter().filter(|named| {
            while known.next_if(|known| known < named).is_some() {}
            **named > highest || known.peek() == Some(named)
        }));
        let is_complete = parked.len() == named.len();
        self.0.splice(..below, parked);
        is_complete
    }

    pub(super) fn replace_below(&mut self, offset: i64, parked: &[i64]) {
        let below = self.0.partition_point(|parked| *parked < offset);
        if below > 0 || !parked.is_empty() {
            self.0.splice(..below, parked.iter().copied());
        }
    }
}

/// The parked records below one that is delivered, for all sessions that get it.
pub(super) struct ParkedBelow<'a> {
    pub(super) offsets: &'a [i64],
    pub(super) shared: Option<Arc<[i64]>>,
}
