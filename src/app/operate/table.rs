//! A table with aligned columns, printed in parts.

/// The columns and their widths. Later parts are at least as wide as earlier ones.
#[derive(Debug)]
pub(super) struct Table {
    widths: Vec<usize>,
    heading: Option<Vec<String>>,
}

impl Table {
    pub(super) fn new(heading: &[&str]) -> Self {
        let heading: Vec<_> = heading.iter().map(|&name| name.to_owned()).collect();
        Self { widths: vec![0; heading.len()], heading: Some(heading) }
    }

    /// The next rows as text, after the heading if they are the first.
    pub(super) fn rows(&mut self, rows: &[Vec<String>]) -> String {
        let heading = self.heading.take();
        let lines: Vec<_> = heading.iter().chain(rows).collect();
        for line in &lines {
            for (width, cell) in self.widths.iter_mut().zip(line.iter()) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for line in lines {
            let cells = self.widths.iter().zip(line).map(|(width, cell)| format!("{cell:width$}"));
            text += cells.collect::<Vec<_>>().join("  ").trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_over_all_parts() {
        let mut table = Table::new(&["USER", "N"]);
        let row = |user: &str, number: &str| vec![user.to_owned(), number.to_owned()];
        assert_eq!(
            table.rows(&[row("änne", "1"), row("bartholomew", "22")]),
            "USER         N\nänne         1\nbartholomew  22\n"
        );
        assert_eq!(table.rows(&[row("c", "3")]), "c            3\n");
        assert_eq!(Table::new(&["A", "B"]).rows(&[]), "A  B\n");
    }
}
