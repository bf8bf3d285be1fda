//! A layer's notes in a file.

use super::{LayerEviction, WatchedHead, is_received};
use crate::arch::HeadLayout;
use crate::compress::Eviction;
use crate::compress::budget::methods::StepAttention;
use crate::error::Result;
use crate::records::{Sink, Source};
use crate::tokens::TokenClass;

impl LayerEviction {
    /// Writes the notes.
    pub fn save(&self, sink: &mut Sink<'_>) {
        sink.count(self.first_position);
        for head in &self.heads {
            sink.count(head.level);
            sink.count(head.budget);
            sink.count(head.first_row);
            sink.count(head.received.len());
            sink.f32s(&head.received);
            sink.count(head.classes.len());
            for class in &head.classes {
                sink.u32(u32::from(class.special) | u32::from(class.punctuation) << 1);
            }
            sink.count(head.queries.len());
            head.queries.iter().for_each(|query| sink.f32s(query));
        }
    }

    /// Reads what was written.
    ///
    /// * `seen`: tokens that were given
    /// * `lens`: `[num_kv_heads]` rows that each head holds
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) if it can't be.
    pub fn load(
        eviction: &Eviction,
        layout: HeadLayout,
        seen: usize,
        lens: &[usize],
        source: &mut Source,
    ) -> Result<Self> {
        let first_position = source.count()?;
        if first_position > seen {
            return Err(source.error(format_args!("a prompt from position {first_position} on, of {seen}")));
        }
        let mut heads = Vec::with_capacity(lens.len());
        for &rows in lens {
            let (level, budget, first_row) = (source.count()?, source.count()?, source.count()?);
            if level >= eviction.num_levels() || first_row > rows {
                return Err(source.error(format_args!("a head at level {level}, noted from row {first_row} of {rows}")));
            }
            let attention = eviction.attention(level);
            let expect = |what: &str, noted: usize, expected: usize, source: &Source| {
                let wrong = || source.error(format_args!("{noted} {what} are noted of a head, expected {expected}"));
                if noted == expected { Ok(()) } else { Err(wrong()) }
            };
            let noted = source.count()?;
            let is_summed = attention.is_some_and(is_received);
            expect("sums", noted, if is_summed { rows - first_row } else { 0 }, source)?;
            let received = source.f32s(noted)?;
            let noted = source.count()?;
            let is_classed = attention.is_some() && eviction.reads_classes();
            expect("classes", noted, if is_classed { rows - first_row } else { 0 }, source)?;
            let classes = source.u32s(noted)?;
            let class = |bits: u32| TokenClass { special: bits & 1 == 1, punctuation: bits >> 1 & 1 == 1 };
            let noted = source.count()?;
            let most = match attention {
                Some(StepAttention::Queries(tokens)) => tokens.saturating_sub(1),
                _ => 0,
            };
            if noted > most {
                return Err(source.error(format_args!("queries of {noted} tokens are noted of a head, at most {most}")));
            }
            let query = layout.group_size() * layout.head_dim;
            heads.push(WatchedHead {
                level,
                budget,
                attention,
                first_row,
                received,
                classes: classes.into_iter().map(class).collect(),
                queries: (0..noted).map(|_| source.f32s(query)).collect::<Result<_>>()?,
            });
        }
        Ok(Self { eviction: eviction.clone(), first_position, heads })
    }
}
