//! How the work of a step is cut, for threads to claim.

use std::ops::Range;

use super::KernelLayer;
use crate::attention::decode::ranges;
use crate::kernels::team::Worker;

/// A piece of weights has at least as many rows as if each thread got so many equal ones.
const PIECES_PER_THREAD: usize = 8;

/// Rows of weights that are not parted.
const UNIT: usize = 16;

/// Units in a piece, at most: its products stay in a core's cache.
const MAX_PIECE: usize = 64;

/// What there is to do for the caches of one layer, with the token that is about to be added.
#[derive(Debug, Default)]
pub(super) struct CacheWork {
    /// All heads' rows.
    pub ranges: Vec<CacheRange>,
    /// Of `ranges`, which ones are claimed together.
    pub pieces: Vec<Range<usize>>,
    /// The heads of which rows may go, as a sequence and a KV head.
    pub evicting: Vec<(usize, usize)>,
}

/// Rows of one head of one sequence.
#[derive(Debug, Clone)]
pub(super) struct CacheRange {
    /// Whose queries attend to them: a sequence's, or, in a [run](super::TokenRun), those of one of its tokens.
    pub sequence: usize,
    pub kv_head: usize,
    pub rows: Range<usize>,
    /// Whether they are the last of the head.
    pub last: bool,
}

impl CacheWork {
    /// Cuts the work of a layer anew.
    pub fn cut(&mut self, caches: &[&mut [KernelLayer]], layer: usize, threads: usize) {
        self.ranges.clear();
        self.evicting.clear();
        for (sequence, cache) in caches.iter().enumerate() {
            let layer = &cache[layer];
            for (kv_head, head) in layer.rows().heads().iter().enumerate() {
                let len = head.len() + 1;
                self.ranges.extend(ranges(head.num_settled(), len).map(|rows| {
                    let last = rows.end == len;
                    CacheRange { sequence, kv_head, rows, last }
                }));
                if layer.ledger().evicts(kv_head) {
                    self.evicting.push((sequence, kv_head));
                }
            }
        }
        self.pieces.clear();
        self.pieces.extend(pieces(self.ranges.len(), threads, 1, usize::MAX));
    }
}

/// Cuts `count` things that lie one after the other into pieces, the longest first: a thread that stays with a piece finds
/// what follows fetched ahead (two threads decode by up to a quarter faster so), and short pieces at the end let all threads finish together.
///
/// * `least`: in a piece, but for the last
/// * `most`: in a piece
pub(super) fn pieces(count: usize, threads: usize, least: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = count - first;
        let len = (left / (2 * threads)).clamp(least, most).min(left);
        first += len;
        (len > 0).then_some(first - len..first)
    })
}

/// Cuts rows of weights into pieces, in units of [`UNIT`] rows.
pub(super) fn weight_pieces(rows: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let least = (rows / (PIECES_PER_THREAD * threads * UNIT)).clamp(1, MAX_PIECE / 4);
    pieces(rows.div_ceil(UNIT), threads, least, MAX_PIECE)
}

/// Runs a phase over pieces of `rows` rows of weights.
pub(super) fn each_piece(worker: &mut Worker<'_>, rows: usize, mut work: impl FnMut(Range<usize>)) {
    let threads = worker.team_size();
    let pieces = || weight_pieces(rows, threads);
    worker.phase(pieces().count(), |piece| {
        if let Some(units) = pieces().nth(piece) {
            work(units.start * UNIT..(units.end * UNIT).min(rows));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn pieces_are_all_that_there_is_in_order_and_ever_shorter() {
        for count in [0, 1, 2, 15, 36, 200, 3072] {
            for threads in [1, 2, 3, 16] {
                for (least, most) in [(1, usize::MAX), (1, 64), (4, 4), (16, 64)] {
                    let pieces: Vec<_> = pieces(count, threads, least, most).collect();
                    let case = format!("{count} on {threads} threads, {least} to {most}: {pieces:?}");
                    assert_eq!(
                        pieces.iter().cloned().flatten().collect::<Vec<_>>(),
                        (0..count).collect::<Vec<_>>(),
                        "{case}"
                    );
                    assert!(pieces.windows(2).all(|two| two[0].len() >= two[1].len()), "{case}");
                    let (last, others) =
                        pieces.split_last().map_or((0, &[][..]), |(last, others)| (last.len(), others));
                    assert!(last <= most && others.iter().all(|piece| (least..=most).contains(&piece.len())), "{case}");
                }
            }
        }
        let lengths = |count| pieces(count, 2, 1, usize::MAX).map(|piece| piece.len()).collect::<Vec<_>>();
        assert_eq!(lengths(27), [6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1]);
    }
}
