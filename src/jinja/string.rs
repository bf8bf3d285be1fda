//! Strings that know which of their characters the user wrote.

use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use super::Origin;
use super::error::{Res, limit};
use super::heap::{Charge, note_copied};

/// A string of which every character has an origin. Cheap to copy.
#[derive(Debug, Clone)]
pub(super) struct Str(Rc<Body>);

#[derive(Debug)]
struct Body {
    text: Text,
    marks: Marks,
    /// Number of characters.
    len: usize,
    /// Markup, which `escape` leaves alone.
    safe: bool,
    _charge: Charge,
}

#[derive(Debug)]
enum Text {
    Own(String),
    Shared(Arc<str>),
}

/// The origins of a string: one, or where each run of one ends, in bytes.
#[derive(Debug, Clone)]
enum Marks {
    One(Origin),
    Many(Rc<[(usize, Origin)]>),
}

impl Str {
    fn with(text: Text, marks: Marks, safe: bool) -> Self {
        let (bytes, len) = match &text {
            Text::Own(text) => (text.capacity(), super::text::count_chars(text)),
            Text::Shared(text) => (0, super::text::count_chars(text)),
        };
        note_copied(len);
        let runs = if let Marks::Many(runs) = &marks { runs.len() * 16 } else { 0 };
        Self(Rc::new(Body { text, marks, len, safe, _charge: Charge::new(160 + bytes + runs) }))
    }

    /// A text of one origin.
    pub fn plain(text: String, origin: Origin) -> Self {
        Self::with(Text::Own(text), Marks::One(origin), false)
    }

    /// A text of the template.
    pub fn shared(text: Arc<str>) -> Self {
        Self::with(Text::Shared(text), Marks::One(Origin::Template), false)
    }

    pub fn empty() -> Self {
        Self::plain(String::new(), Origin::Template)
    }

    pub fn text(&self) -> &str {
        match &self.0.text {
            Text::Own(text) => text,
            Text::Shared(text) => text,
        }
    }

    /// Whether both are one object.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Number of characters.
    pub fn len(&self) -> usize {
        self.0.len
    }

    pub fn is_empty(&self) -> bool {
        self.text().is_empty()
    }

    pub fn is_ascii(&self) -> bool {
        self.0.len == self.text().len()
    }

    pub fn is_safe(&self) -> bool {
        self.0.safe
    }

    /// The same text as markup, or as none.
    pub fn with_safe(&self, safe: bool) -> Self {
        if safe == self.0.safe {
            return self.clone();
        }
        let text = match &self.0.text {
            Text::Own(text) => Text::Own(text.clone()),
            Text::Shared(text) => Text::Shared(Arc::clone(text)),
        };
        Self::with(text, self.0.marks.clone(), safe)
    }

    /// Where a character begins, in bytes; the end for those beyond.
    pub fn byte_at(&self, char_idx: usize) -> usize {
        if self.is_ascii() {
            return char_idx.min(self.text().len());
        }
        self.text().char_indices().nth(char_idx).map_or(self.text().len(), |(at, _)| at)
    }

    /// A part, by bytes.
    pub fn slice(&self, start: usize, end: usize) -> Self {
        if start == 0 && end == self.text().len() {
            return self.clone();
        }
        let text = self.text()[start..end].to_owned();
        let marks = match &self.0.marks {
            Marks::One(origin) => Marks::One(*origin),
            Marks::Many(_) => {
                let mut runs: Vec<_> = self.runs(start, end).map(|(_, end, origin)| (end - start, origin)).collect();
                match runs.as_mut_slice() {
                    [] => Marks::One(Origin::Template),
                    [(_, origin)] => Marks::One(*origin),
                    _ => Marks::Many(runs.into()),
                }
            }
        };
        Self::with(Text::Own(text), marks, self.0.safe)
    }

    /// Where a slice of [`Str::text`] begins, in bytes.
    pub fn place(&self, part: &str) -> usize {
        part.as_ptr() as usize - self.text().as_ptr() as usize
    }

    /// A part, by the place of a slice of [`Str::text`].
    pub fn part(&self, part: &str) -> Self {
        let start = self.place(part);
        self.slice(start, start + part.len())
    }

    /// The runs of one origin within a range: start, end, origin.
    pub fn runs(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, usize, Origin)> {
        let (one, many): (Option<Origin>, &[(usize, Origin)]) = match &self.0.marks {
            Marks::One(origin) => (Some(*origin), &[]),
            Marks::Many(runs) => (None, runs),
        };
        let first = many.partition_point(|&(run_end, _)| run_end <= start);
        let one = one.filter(|_| start < end).map(|origin| (start, end, origin));
        let mut at = start;
        one.into_iter().chain(many[first..].iter().map_while(move |&(run_end, origin)| {
            let run = (at < end).then_some((at, run_end.min(end), origin));
            at = run_end;
            run
        }))
    }

    /// The origin of the character that begins at a byte.
    pub fn origin_at(&self, byte: usize) -> Origin {
        match &self.0.marks {
            Marks::One(origin) => *origin,
            Marks::Many(runs) => {
                let at = runs.partition_point(|&(end, _)| end <= byte).min(runs.len() - 1);
                runs[at].1
            }
        }
    }

    /// The origin, if there is only one.
    pub fn origin(&self) -> Option<Origin> {
        if let Marks::One(origin) = self.0.marks { Some(origin) } else { None }
    }
}

impl PartialEq for Str {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0) || self.text() == other.text()
    }
}

impl Eq for Str {}

impl Hash for Str {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}

/// A string being built, no larger than its limit.
#[derive(Debug)]
pub(super) struct StrBuf {
    text: String,
    runs: Vec<(usize, Origin)>,
    limit: usize,
    charge: Charge,
}

impl StrBuf {
    pub fn new(limit: usize) -> Self {
        Self { text: String::new(), runs: Vec::new(), limit, charge: Charge::default() }
    }

    pub fn len(&self) -> usize {
        self.text.len()
    }

    pub fn push(&mut self, text: &str, origin: Origin) -> Res<()> {
        if text.is_empty() {
            return Ok(());
        }
        let runs = self.runs.len() * 16;
        if self.text.len() + text.len() + runs > self.limit {
            return Err(limit(format!("a text grows beyond {} bytes", self.limit)));
        }
        note_copied(text.len());
        self.text.push_str(text);
        match self.runs.last_mut() {
            Some((end, last)) if *last == origin => *end = self.text.len(),
            _ => self.runs.push((self.text.len(), origin)),
        }
        self.charge.at_least(self.text.capacity() + 16 * self.runs.capacity());
        Ok(())
    }

    pub fn push_char(&mut self, c: char, origin: Origin) -> Res<()> {
        self.push(c.encode_utf8(&mut [0; 4]), origin)
    }

    pub fn push_str(&mut self, text: &Str) -> Res<()> {
        self.push_slice(text, 0, text.text().len())
    }

    pub fn push_slice(&mut self, text: &Str, start: usize, end: usize) -> Res<()> {
        if let Some(origin) = text.origin() {
            return self.push(&text.text()[start..end], origin);
        }
        text.runs(start, end).try_for_each(|(start, end, origin)| self.push(&text.text()[start..end], origin))
    }

    pub fn finish(self) -> Str {
        let marks = match self.runs.as_slice() {
            [] => Marks::One(Origin::Template),
            [(_, origin)] => Marks::One(*origin),
            _ => Marks::Many(self.runs.into()),
        };
        Str::with(Text::Own(self.text), marks, false)
    }

    pub fn into_parts(self) -> (String, Vec<(usize, Origin)>) {
        (self.text, self.runs)
    }
}
