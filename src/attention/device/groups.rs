//! Which heads of a layer are attended to together: those that keep about equally many rows.
//!
//! Heads are put in order of how many rows they keep, and cut into groups. Within a group all are padded to the longest,
//! so that one product serves the group. The fewest groups are taken whose padding stays within a share of the kept rows.
//!
//! Not for: moving rows (see [`crate::backend::CandleRows`]).

/// Padding rows of a layer are at most this share of its kept rows, as a divisor.
pub const PADDING_SHARE: usize = 40;

/// Heads that are attended to together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadGroup {
    /// Slot of its first head; the others follow.
    pub first_slot: usize,
    /// Number of heads, at least 1.
    pub num_heads: usize,
    /// Rows of each head, padding included; may be 0.
    pub len: usize,
    /// Where its rows begin among those of the layer: `num_heads * len` of them, head after head.
    pub first_row: usize,
}

/// The order of a layer's heads, and their groups.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slots {
    /// `[num_kv_heads]` the KV head in each slot: from the longest to the shortest, unless they are ungrouped.
    pub heads: Vec<usize>,
    /// From the first slot to the last.
    pub groups: Vec<HeadGroup>,
    /// `[num_kv_heads]` where the rows of the head in each slot begin.
    pub first_rows: Vec<usize>,
}

impl Slots {
    /// Puts heads in order and groups them.
    ///
    /// * `lens`: `[num_kv_heads]` rows that each KV head keeps
    #[must_use]
    pub fn new(lens: &[usize]) -> Self {
        let mut heads: Vec<usize> = (0..lens.len()).collect();
        heads.sort_by_key(|&head| std::cmp::Reverse(lens[head])); // stable: equal ones stay in order
        let sorted: Vec<usize> = heads.iter().map(|&head| lens[head]).collect();
        let mut slots = Self { heads, groups: Vec::new(), first_rows: Vec::new() };
        let mut first_row = 0;
        for (first_slot, end) in cut(&sorted) {
            let (num_heads, len) = (end - first_slot, sorted[first_slot]);
            slots.groups.push(HeadGroup { first_slot, num_heads, len, first_row });
            slots.first_rows.extend((0..num_heads).map(|head| first_row + head * len));
            first_row += num_heads * len;
        }
        slots
    }

    /// Every head in the slot of its own index and in a group of its own, without padding: for attention that takes heads of
    /// any lengths together.
    ///
    /// * `lens`: `[num_kv_heads]` rows that each KV head keeps
    #[must_use]
    pub fn ungrouped(lens: &[usize]) -> Self {
        let mut slots = Self { heads: (0..lens.len()).collect(), ..Self::default() };
        let mut first_row = 0;
        for (first_slot, &len) in lens.iter().enumerate() {
            slots.groups.push(HeadGroup { first_slot, num_heads: 1, len, first_row });
            slots.first_rows.push(first_row);
            first_row += len;
        }
        slots
    }

    /// Rows of all groups, padding included.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.groups.last().map_or(0, |group| group.first_row + group.num_heads * group.len)
    }

    /// Rows of the longest head.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.groups.iter().map(|group| group.len).max().unwrap_or(0)
    }

    /// Whether every head is in the slot of its own index.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.heads.iter().enumerate().all(|(slot, &head)| slot == head)
    }

    /// `[num_kv_heads]` the slot of each KV head.
    #[must_use]
    pub fn of_heads(&self) -> Vec<usize> {
        let mut slots = vec![0; self.heads.len()];
        for (slot, &head) in self.heads.iter().enumerate() {
            slots[head] = slot;
        }
        slots
    }
}

/// Cuts descending lengths into the fewest ranges whose padding is within the bound.
fn cut(lens: &[usize]) -> Vec<(usize, usize)> {
    let room = lens.iter().sum::<usize>() / PADDING_SHARE;
    let mut sums = vec![0; lens.len() + 1];
    for (index, len) in lens.iter().enumerate() {
        sums[index + 1] = sums[index] + len;
    }
    let padding = |first: usize, end: usize| (end - first) * lens[first] - (sums[end] - sums[first]);
    // `[end]` the least padding of the lengths before `end` in so many ranges, and where the last of them begins.
    let mut least: Vec<Option<usize>> = vec![None; lens.len() + 1];
    least[0] = Some(0);
    let mut begins: Vec<Vec<usize>> = Vec::new();
    while least[lens.len()].is_none_or(|padding| padding > room) {
        let mut begin = vec![0; lens.len() + 1];
        let mut next = vec![None; lens.len() + 1];
        for end in 1..=lens.len() {
            let options = (0..end).filter_map(|first| Some((least[first]? + padding(first, end), first)));
            if let Some((padding, first)) = options.min() {
                (next[end], begin[end]) = (Some(padding), first);
            }
        }
        least = next;
        begins.push(begin);
    }
    let mut ranges = Vec::with_capacity(begins.len());
    let mut end = lens.len();
    for begin in begins.iter().rev() {
        ranges.push((begin[end], end));
        end = begin[end];
    }
    ranges.reverse();
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn padding(lens: &[usize], slots: &Slots) -> usize {
        slots.num_rows() - lens.iter().sum::<usize>()
    }

    #[test]
    fn equal_heads_are_one_group_without_padding() {
        let slots = Slots::new(&[7; 5]);
        assert_eq!(slots.groups, [HeadGroup { first_slot: 0, num_heads: 5, len: 7, first_row: 0 }]);
        assert_eq!(slots.first_rows, [0, 7, 14, 21, 28]);
        assert!(slots.is_in_order());
        assert_eq!(Slots::new(&[]), Slots::default());
    }

    #[test]
    fn near_lengths_share_a_group_and_far_ones_do_not() {
        let lens = [10, 1000, 11, 990, 0, 500];
        let slots = Slots::new(&lens);
        assert_eq!(slots.heads, [1, 3, 5, 2, 0, 4]);
        let groups: Vec<(usize, usize)> = slots.groups.iter().map(|group| (group.num_heads, group.len)).collect();
        assert_eq!(groups, [(2, 1000), (1, 500), (3, 11)]);
        assert_eq!(padding(&lens, &slots), 10 + 1 + 11);
        assert_eq!(slots.first_rows, [0, 1000, 2000, 2500, 2511, 2522]);
        assert_eq!(slots.of_heads(), [4, 0, 3, 1, 5, 2]);
    }

    #[test]
    fn ungrouped_heads_stay_in_order_and_get_no_padding() {
        let lens = [10, 0, 1000, 990];
        let slots = Slots::ungrouped(&lens);
        assert!(slots.is_in_order());
        assert_eq!((slots.num_rows(), slots.longest(), padding(&lens, &slots)), (2000, 1000, 0));
        assert_eq!(slots.first_rows, [0, 10, 10, 1010]);
        assert_eq!(Slots::ungrouped(&[]), Slots::default());
    }

    #[test]
    fn padding_is_bounded_and_no_fewer_groups_would_do() {
        let mut number = 1u64;
        for heads in 1..=9usize {
            for _ in 0..50 {
                let lens: Vec<usize> = (0..heads)
                    .map(|_| {
                        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        (number >> 40) as usize % 40
                    })
                    .collect();
                let slots = Slots::new(&lens);
                let room = lens.iter().sum::<usize>() / PADDING_SHARE;
                assert!(padding(&lens, &slots) <= room, "{lens:?}");
                // Every way to cut, by the bits of where a group ends.
                let sorted: Vec<usize> = slots.heads.iter().map(|&head| lens[head]).collect();
                let fewest = (0..1u32 << (heads - 1))
                    .filter(|cuts| {
                        let (mut rows, mut longest) = (0, 0);
                        for (index, &len) in sorted.iter().enumerate() {
                            if index == 0 || cuts >> (index - 1) & 1 == 1 {
                                longest = len;
                            }
                            rows += longest;
                        }
                        rows - lens.iter().sum::<usize>() <= room
                    })
                    .map(|cuts| cuts.count_ones() as usize + 1)
                    .min();
                assert_eq!(Some(slots.groups.len()), fewest, "{lens:?}");
            }
        }
    }
}
