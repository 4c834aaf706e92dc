//! The tail of a partition: memory of what it keeps, and CPU to keep a record.

use std::hint::black_box;
use std::io;

use delivery::domain::members::Members;
use delivery::service::cluster::tail::{PartitionTail, TailAudience, TailBudget, TailRecord};

use crate::names::user;
use crate::payload::conversation_id;
use crate::usage::{resident_bytes, thread_ns};

/// Conversations, and members of each.
const CONVERSATIONS: usize = 10_000;
const MEMBERS: usize = 10;

/// Puts records into a tail, as a router does, at a given rate of a simulated clock.
#[derive(clap::Args, Debug)]
pub struct TailPlan {
    /// Records a second.
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 300)]
    bytes: usize,
    /// TAIL_AGE, s.
    #[arg(long, default_value_t = 300)]
    age: u64,
    /// TAIL_BYTES, MiB.
    #[arg(long, default_value_t = 1024)]
    tail_mib: u64,
}

impl TailPlan {
    /// Prints what the tail holds after its age, and what a record costs then.
    ///
    /// # Errors
    /// The process cannot be measured.
    pub fn run(&self) -> io::Result<()> {
        let audience = |conversation: usize| TailAudience {
            members: (0..MEMBERS)
                .map(|member| user(conversation * 7 + member * 1_009))
                .collect::<Members>(),
            other: None,
        };
        let audiences: Vec<_> = (0..CONVERSATIONS).map(audience).collect();
        let keys: Vec<_> = (0..CONVERSATIONS).map(conversation_id).collect();
        let value = vec![b'x'; self.bytes];
        let budget = TailBudget::new(self.tail_mib << 20, self.age * 1_000);
        let before = resident_bytes(std::process::id())?;
        let mut tail = PartitionTail::new(0, budget.clone());
        let next = |offset: u64| {
            let conversation = (offset as usize).wrapping_mul(7_919) % CONVERSATIONS;
            let at_ms = offset * 1_000 / self.rate;
            let key = Some(keys[conversation].as_bytes());
            let record =
                TailRecord { offset: offset as i64, appended_at_ms: at_ms, key, value: &value };
            (record, &audiences[conversation], at_ms)
        };
        let mut push = |offset: u64| {
            let (record, audience, at_ms) = next(offset);
            tail.push(record, Some(audience), at_ms);
            tail.len()
        };
        let window = self.rate * self.age;
        let from_ns = thread_ns();
        (0..window).for_each(|offset| _ = black_box(next(black_box(offset))));
        let loop_ns = thread_ns() - from_ns;
        let (from_ns, mut kept) = (thread_ns(), 0);
        (0..window).for_each(|offset| kept = push(offset));
        let filled_ns = thread_ns() - from_ns;
        let resident = resident_bytes(std::process::id())?.saturating_sub(before);
        let counted = budget.bytes();
        let from_ns = thread_ns();
        (window..2 * window).for_each(|offset| kept = push(offset));
        let steady_ns = thread_ns() - from_ns;
        let content = (self.bytes + keys[0].len()) as u64;
        let per_record = |ns: u64| ns.saturating_sub(loop_ns) as f64 / window as f64 / 1_000.0;
        println!("records kept                        {kept}");
        println!("their keys and values               {} B", kept as u64 * content);
        println!("counted (at most TAIL_BYTES)        {counted} B of {}", budget.bytes_max());
        println!("the process has grown by            {resident} B");
        println!("CPU of a record while it fills      {:.3} us", per_record(filled_ns));
        println!("CPU of a record once one is dropped {:.3} us", per_record(steady_ns));
        Ok(())
    }
}
