//! The filter `wordwrap`: Python's `textwrap`.

use std::collections::VecDeque;
use std::sync::LazyLock;

use fancy_regex::{Regex, RegexBuilder};

use super::Origin;
use super::error::{Res, failed, limit, unsupported};
use super::interp::Vm;
use super::object::CallArgs;
use super::string::{Str, StrBuf};
use super::text;
use super::value::Value;

#[allow(clippy::needless_pass_by_value, reason = "all filters have one type")]
pub(super) fn wordwrap(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [width, break_long, with, hyphens] =
        args.bind("wordwrap", ["width", "break_long_words", "wrapstring", "break_on_hyphens"], 0)?;
    let Value::Str(text) = value.defined()? else {
        return Err(failed(format!("'{}' object has no attribute 'splitlines'", value.type_name())));
    };
    // Nothing is wrapped, and no width looked at.
    if text.is_empty() {
        return Ok(Value::text(""));
    }
    let width = width.map_or(Some(79), |width| width.as_whole()).ok_or_else(|| failed("width must be a number"))?;
    if width <= 0 {
        return Err(failed(format!("invalid width {width} (must be > 0)")));
    }
    let width = usize::try_from(width).unwrap_or(usize::MAX);
    let with = match with {
        None | Some(Value::None) => Str::plain("\n".into(), Origin::Template),
        Some(with) => vm.str(&with)?,
    };
    let break_long = break_long.is_none_or(|on| on.is_true());
    let hyphens = hyphens.is_none_or(|on| on.is_true());
    vm.scanning(text.text().len() * 16)?;
    let mut out = vm.buf();
    for (at, line) in text::lines(text.text()).enumerate() {
        if at > 0 {
            out.push_str(&with)?;
        }
        let line = text.part(text::without_end(line));
        wrap(vm, &line, width, break_long, hyphens, &with, &mut out)?;
    }
    Ok(Value::Str(out.finish()))
}

fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\x0B' | '\x0C' | '\r' | ' ')
}

/// Words and white space, words cut after hyphens between letters: `TextWrapper.wordsep_re` of Python's `textwrap`, or
/// its `wordsep_simple_re`, with the classes of Python's characters.
fn chunks(vm: &Vm, line: &str, hyphens: bool) -> Res<VecDeque<(usize, usize)>> {
    static WORDS: LazyLock<[Option<Regex>; 2]> = LazyLock::new(|| {
        let simple = r"[\t-\r ]+|[^\t-\r ]+";
        let whole = concat!(
            r#"[\t-\r ]+|(?<=[\p{L}\p{N}_!"'&.,?])-{2,}(?=[\p{L}\p{N}_])|"#,
            r#"[^\t-\r ]+?(?:-(?:(?<=[\p{L}\p{Nl}\p{No}_]{2}-)|(?<=[\p{L}\p{Nl}\p{No}_]-[\p{L}\p{N}_!"'&.,?]-))"#,
            r"(?=[\p{L}\p{Nl}\p{No}_]-?[\p{L}\p{Nl}\p{No}_])",
            r#"|(?=[\t-\r ]|\z)|(?<=[\p{L}\p{N}_!"'&.,?])(?=-{2,}[\p{L}\p{N}_]))"#,
        );
        [simple, whole].map(|pattern| RegexBuilder::new(pattern).backtrack_limit(usize::MAX).build().ok())
    });
    let regex = WORDS[usize::from(hyphens)].as_ref().ok_or_else(|| unsupported("the filter `wordwrap`"))?;
    let mut found = VecDeque::new();
    let (mut at, mut chars) = (0, 0);
    for word in regex.find_iter(line) {
        let word = word.map_err(|error| limit(format!("a line cannot be wrapped: {error}")))?;
        vm.step()?;
        let start = chars;
        chars += text::count_chars(&line[at..word.end()]);
        at = word.end();
        found.push_back((start, chars));
    }
    Ok(found)
}

fn wrap(vm: &Vm, line: &Str, width: usize, break_long: bool, hyphens: bool, with: &Str, out: &mut StrBuf) -> Res<()> {
    vm.fits(line.len())?;
    let chars: Vec<char> = line.text().chars().collect();
    let mut chunks = chunks(vm, line.text(), hyphens)?;
    let blank = |&(start, end): &(usize, usize)| chars[start..end].iter().all(|&c| is_blank(c));
    let mut first = true;
    while !chunks.is_empty() {
        vm.step()?;
        if !first && chunks.front().is_some_and(blank) {
            chunks.pop_front();
        }
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut len = 0;
        while let Some(&(start, end)) = chunks.front()
            && len + (end - start) <= width
        {
            taken.extend(chunks.pop_front());
            len += end - start;
        }
        if let Some(&(start, end)) = chunks.front()
            && end - start > width
        {
            if break_long {
                let mut cut = start + (width - len);
                if hyphens && end - start > width - len {
                    // A hyphen within what fits is a better place, if something stands before it.
                    let fitting = &chars[start..cut];
                    if let Some(hyphen) = fitting.iter().rposition(|&c| c == '-').filter(|&at| at > 0)
                        && fitting[..hyphen].iter().any(|&c| c != '-')
                    {
                        cut = start + hyphen + 1;
                    }
                }
                // Where no room is left, nothing is put there: the white space before it is not the last any more.
                taken.push((start, cut));
                chunks[0].0 = cut;
            } else if taken.is_empty() {
                taken.extend(chunks.pop_front());
            }
        }
        if taken.last().is_some_and(blank) {
            taken.pop();
        }
        if let (Some((start, _)), Some((_, end))) = (taken.first(), taken.last()) {
            if !first {
                out.push_str(with)?;
            }
            first = false;
            let (from, to) = (line.byte_at(*start), line.byte_at(*end));
            vm.scanning(line.text().len().min(to + 1))?;
            out.push_slice(line, from, to)?;
        } else if taken.is_empty() && chunks.is_empty() {
            break;
        }
    }
    Ok(())
}
