//! The filter `wordwrap`: Python's `textwrap`.

use super::Origin;
use super::error::{Res, failed};
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

/// Words and white space, words cut after hyphens that stand between letters.
fn chunks(chars: &[char], hyphens: bool) -> Vec<(usize, usize)> {
    let letter = |at: Option<usize>| {
        at.and_then(|at| chars.get(at)).is_some_and(|&c| text::is_word(c) && !text::is_numeric(c) && c != '_')
    };
    let word = |at: usize| chars.get(at).is_some_and(|&c| text::is_word(c));
    let punct = |at: Option<usize>| {
        at.and_then(|at| chars.get(at)).is_some_and(|&c| text::is_word(c) || "!\"'&.,?".contains(c))
    };
    let dashes = |at: usize| chars[at..].iter().take_while(|&&c| c == '-').count();
    let is_em_dash = |at: usize| {
        let count = dashes(at);
        at > 0 && punct(Some(at - 1)) && count >= 2 && word(at + count)
    };
    let mut found = Vec::new();
    let mut start = 0;
    while start < chars.len() {
        let mut end = start;
        if is_blank(chars[start]) {
            while end < chars.len() && is_blank(chars[end]) {
                end += 1;
            }
        } else if hyphens && is_em_dash(start) {
            end += dashes(start);
        } else {
            end += 1;
            while end < chars.len() && !is_blank(chars[end]) {
                if hyphens {
                    let two_letters = letter(end.checked_sub(2)) && letter(end.checked_sub(1)) && end >= start + 2;
                    let after_hyphen =
                        letter(end.checked_sub(3)) && end >= 2 && chars[end - 2] == '-' && punct(end.checked_sub(1));
                    let next = letter(Some(end + 1))
                        && (letter(Some(end + 2)) || chars.get(end + 2) == Some(&'-') && letter(Some(end + 3)));
                    if chars[end] == '-' && (two_letters || after_hyphen) && next {
                        end += 1;
                        break;
                    }
                    if is_em_dash(end) {
                        break;
                    }
                }
                end += 1;
            }
        }
        found.push((start, end));
        start = end;
    }
    found
}

fn wrap(vm: &Vm, line: &Str, width: usize, break_long: bool, hyphens: bool, with: &Str, out: &mut StrBuf) -> Res<()> {
    vm.fits(line.len())?;
    let chars: Vec<char> = line.text().chars().collect();
    let mut chunks: std::collections::VecDeque<_> = chunks(&chars, hyphens).into();
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
                if cut > start {
                    taken.push((start, cut));
                    chunks[0].0 = cut;
                }
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
