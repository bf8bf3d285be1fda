//! A ledger in a file.

use super::worths::{WORTH_BYTES, Worths};
use super::{LayerEviction, Ledger, Positions};
use crate::compress::Eviction;
use crate::error::Result;
use crate::records::{Sink, Source};

/// How a head's positions are written.
const LIST: u32 = 0;
const BITS: u32 = 1;

impl Ledger {
    /// Writes what is not known beforehand: how far it was decided, positions, scores, and notes on what goes next.
    pub fn save(&self, sink: &mut Sink<'_>) {
        sink.count(self.settled);
        for positions in self.positions().iter() {
            save_positions(positions, self.seen, sink);
        }
        self.worths.save(sink);
        sink.u32(self.eviction.is_some().into());
        if let Some(eviction) = &self.eviction {
            eviction.save(sink);
        }
    }

    /// Takes in what was written, in books that are empty.
    ///
    /// * `seen`: tokens that were given, of which no profile has decided about the last `undecided`
    /// * `eviction`: present if heads go on evicting while tokens are generated
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) if it can't be.
    pub fn load(
        &mut self,
        (seen, undecided): (usize, usize),
        eviction: Option<&Eviction>,
        source: &mut Source,
    ) -> Result<()> {
        let settled = source.count()?;
        if settled.checked_add(undecided).is_none_or(|decided| decided > seen) {
            return Err(source.error(format_args!("{settled} of {seen} tokens are decided about, {undecided} are not")));
        }
        let positions = (0..self.layout.num_kv_heads).map(|_| load_positions(seen, source));
        self.positions = Positions::shared(positions.collect::<Result<_>>()?);
        self.worths = Worths::load(&self.lens(), source)?;
        let is_watched = source.u32()?;
        if is_watched != u32::from(eviction.is_some() && seen > 0) {
            return Err(source.error(format_args!("{is_watched} for whether heads go on evicting")));
        }
        self.eviction = match eviction {
            Some(eviction) if is_watched == 1 => {
                Some(LayerEviction::load(eviction, self.layout, seen, &self.lens(), source)?)
            }
            _ => None,
        };
        (self.seen, self.settled) = (seen, settled);
        self.expect_newest(source)
    }

    /// Checks that tokens which came since the last prompt are held: all of them, unless heads go on evicting, or as many as
    /// the window has not passed.
    fn expect_newest(&self, source: &Source) -> Result<()> {
        if self.is_watched() {
            return Ok(());
        }
        let newest = self.settled.max(self.first_in_window(self.seen))..self.seen;
        for positions in self.positions().iter() {
            let is_new = |position: &u32| newest.contains(&(*position as usize));
            let held = positions.iter().filter(|position| is_new(position)).count();
            // They are the last in their order, unless rows have left a window one by one.
            let last = &positions[positions.len() - held..];
            let is_behind = self.window.is_some() || last.iter().all(is_new) && last.is_sorted();
            if held != newest.len() || !is_behind {
                return Err(source.error(format_args!("a head holds {held} of the {} newest tokens", newest.len())));
            }
        }
        Ok(())
    }
}

impl Worths {
    fn save(&self, sink: &mut Sink<'_>) {
        sink.u32((!self.bits().is_empty()).into());
        for head in self.bits() {
            sink.count(head.len());
            for worth in head {
                sink.bytes(&worth.to_le_bytes());
            }
            sink.align(size_of::<u32>());
        }
    }

    /// * `lens`: `[num_kv_heads]` rows of each head
    fn load(lens: &[usize], source: &mut Source) -> Result<Self> {
        match source.u32()? {
            0 => return Ok(Self::default()),
            1 => {}
            other => return Err(source.error(format_args!("{other} for whether rows have scores"))),
        }
        let mut worths = Vec::with_capacity(lens.len());
        for &rows in lens {
            let count = source.count()?;
            if count > rows {
                return Err(source.error(format_args!("{count} scores of {rows} rows")));
            }
            let bytes = source.bytes(count * WORTH_BYTES)?;
            let head: Vec<u16> = bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
            if head.iter().any(|&worth| !f32::from_bits(u32::from(worth) << 16).is_finite()) {
                return Err(source.error("a score that is no number"));
            }
            worths.push(head);
            source.align(size_of::<u32>())?;
        }
        Ok(Self::of_bits(worths))
    }
}

/// As a list, or as a bit for each token if that is smaller and the order is that of the text.
fn save_positions(positions: &[u32], seen: usize, sink: &mut Sink<'_>) {
    let bytes = seen.div_ceil(8);
    sink.count(positions.len());
    if size_of_val(positions) < bytes || !positions.is_sorted_by(|a, b| a < b) {
        sink.u32(LIST);
        sink.u32s(positions);
        return;
    }
    sink.u32(BITS);
    let mut bits = vec![0_u8; bytes];
    for &position in positions {
        bits[position as usize / 8] |= 1 << (position % 8);
    }
    sink.bytes(&bits);
    sink.align(size_of::<u32>());
}

fn load_positions(seen: usize, source: &mut Source) -> Result<Vec<u32>> {
    let rows = source.count()?;
    let positions = match source.u32()? {
        LIST => {
            let positions = source.u32s(rows)?;
            let mut is_held = vec![false; seen];
            for &position in &positions {
                match is_held.get_mut(position as usize) {
                    Some(held @ false) => *held = true,
                    Some(_) => return Err(source.error(format_args!("position {position} twice in a head"))),
                    None => return Err(source.error(format_args!("position {position} of {seen} tokens"))),
                }
            }
            positions
        }
        BITS => {
            let bits = source.bytes(seen.div_ceil(8))?;
            let held: usize = bits.iter().map(|byte| byte.count_ones() as usize).sum();
            let mut positions = Vec::with_capacity(held);
            for (first, &byte) in (0..).step_by(8).zip(bits) {
                positions.extend((0..8).filter(|bit| byte >> bit & 1 == 1).map(|bit| first + bit));
            }
            source.align(size_of::<u32>())?;
            if positions.len() != rows || positions.last().is_some_and(|&last| last as usize >= seen) {
                return Err(source.error(format_args!("{held} bits for {rows} rows of {seen} tokens")));
            }
            positions
        }
        other => return Err(source.error(format_args!("positions of kind {other}"))),
    };
    Ok(positions)
}
