//! The instructions of a pickle, carried out one by one; of functions, the few that rebuild a tensor.

use std::collections::HashMap;
use std::path::Path;

use super::{Global, Id, Storage, Tensor, Value, shown};
use crate::error::{Error, Result};

/// Instructions; the largest LLaMA has 40 thousand.
const MAX_INSTRUCTIONS: usize = 1 << 20;
/// Values that wait on the stack; Python flushes a dictionary every 1000 entries.
const MAX_STACK: usize = 1 << 16;
/// Containers that are open within each other.
const MAX_NESTING: usize = 1 << 8;
/// Bytes of a text.
const MAX_TEXT: usize = 1 << 16;
/// Newest protocol that exists.
const MAX_PROTOCOL: u8 = 5;

/// The types of numbers, as attributes of the module `torch`.
#[rustfmt::skip]
const DTYPES: [&str; 26] = [
    "float32", "float", "float16", "half", "bfloat16", "float64", "double",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "int4", "bool",
    "complex32", "complex64", "complex128",
];

/// The machine that a pickle is a program of.
pub(super) struct Machine<'a, 'p> {
    path: &'p Path,
    bytes: &'a [u8],
    at: usize,
    pub values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack where a container was opened.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a, 'p> Machine<'a, 'p> {
    pub fn new(path: &'p Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() }
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    fn damaged(&self, what: &str) -> Error {
        self.error(format!("its pickle {what} before byte {}", self.at))
            .with_hint("the file is damaged: fetch it again, or save it anew with `torch.save`")
    }

    fn foreign(&self, asks: &str) -> Error {
        self.error(format!("its pickle asks {asks}; nothing in a checkpoint is run"))
            .with_hint("use a file with tensors only, as `torch.save(model.state_dict(), path)` writes it")
    }

    /// Runs the program; the value that it leaves.
    pub fn run(&mut self) -> Result<Id> {
        for _ in 0..MAX_INSTRUCTIONS {
            let instruction = self.u8()?;
            if instruction == b'.' {
                let root = self.pop()?;
                return if self.stack.is_empty() && self.marks.is_empty() {
                    Ok(root)
                } else {
                    Err(self.damaged("leaves values behind"))
                };
            }
            self.step(instruction)?;
            if self.stack.len() > MAX_STACK || self.marks.len() > MAX_NESTING {
                return Err(self.damaged("is nested too deeply"));
            }
        }
        Err(self.error(format!("its pickle has more than {MAX_INSTRUCTIONS} instructions")))
    }

    fn step(&mut self, instruction: u8) -> Result<()> {
        if self.arrange(instruction)? {
            return Ok(());
        }
        let value = match self.literal(instruction)? {
            Some(value) => value,
            None => self.made(instruction)?,
        };
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
        Ok(())
    }

    /// Carries out an instruction that moves values, or puts some into another; whether it is one.
    fn arrange(&mut self, instruction: u8) -> Result<bool> {
        match instruction {
            // PROTO
            0x80 => {
                let protocol = self.u8()?;
                if protocol > MAX_PROTOCOL {
                    return Err(self.error(format!("its pickle has the unknown protocol {protocol}")));
                }
            }
            // FRAME: a hint for readers of streams
            0x95 => {
                self.take(8)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            // POP_MARK
            b'1' => {
                self.pop_to_mark()?;
            }
            // DUP
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }

            b'a' => {
                self.pop()?;
                self.append()?;
            }
            b'e' => {
                self.pop_to_mark()?;
                self.append()?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.insert(&items)?;
            }

            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' | b'r' | 0x94 => {
                let place = match instruction {
                    b'q' => u32::from(self.u8()?),
                    b'r' => self.u32()?,
                    _ => u32::try_from(self.memo.len()).map_err(|_| self.damaged("remembers too much"))?,
                };
                let top = self.top()?;
                self.memo.insert(place, top);
            }
            // BINGET, LONG_BINGET
            b'h' | b'j' => {
                let place = if instruction == b'h' { u32::from(self.u8()?) } else { self.u32()? };
                let Some(&id) = self.memo.get(&place) else {
                    return Err(self.damaged("refers to a value that it does not have"));
                };
                self.stack.push(id);
            }

            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?;
            }
            // BUILD: attributes of a dictionary, as PyTorch's notes on versions; they do not matter here
            b'b' => {
                let state = self.pop()?;
                let object = self.top()?;
                let (object, state) = (&self.values[object], &self.values[state]);
                if !matches!((object, state), (Value::Dict(_), Value::Dict(_))) {
                    return Err(self.foreign(&format!("to change the state of {}", object.kind())));
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The value that an instruction holds itself; none if it is no such instruction.
    fn literal(&mut self, instruction: u8) -> Result<Option<Value<'a>>> {
        let value = match instruction {
            b'N' => Value::Other("nothing"),
            0x88 | 0x89 => Value::Other("a boolean"),
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'K' => Value::Int(i64::from(self.u8()?)),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            // LONG1, LONG4
            0x8a | 0x8b => {
                let len = if instruction == 0x8a { usize::from(self.u8()?) } else { self.len32()? };
                self.long(len)?
            }
            b'G' => {
                self.take(8)?;
                Value::Other("a float")
            }

            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, BINSTRING, SHORT_BINSTRING, BINBYTES, SHORT_BINBYTES, BINBYTES8
            b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' | 0x8e => {
                let len = match instruction {
                    b'X' | b'T' | b'B' => self.len32()?,
                    0x8d | 0x8e => self.len64()?,
                    _ => usize::from(self.u8()?),
                };
                if matches!(instruction, b'B' | b'C' | 0x8e) {
                    self.take(len)?;
                    Value::Other("bytes")
                } else {
                    self.text(len)?
                }
            }
            _ => return Ok(None),
        };
        Ok(Some(value))
    }

    /// The value that an instruction makes of those on the stack, or names.
    fn made(&mut self, instruction: u8) -> Result<Value<'a>> {
        Ok(match instruction {
            b')' => Value::Tuple(Vec::new()),
            b't' => Value::Tuple(self.pop_to_mark()?),
            // TUPLE1, TUPLE2, TUPLE3
            0x85..=0x87 => {
                let mut items = vec![0; usize::from(instruction - 0x84)];
                for item in items.iter_mut().rev() {
                    *item = self.pop()?;
                }
                Value::Tuple(items)
            }
            b']' => Value::List,
            b'l' => {
                self.pop_to_mark()?;
                Value::List
            }
            b'}' => Value::Dict(Vec::new()),
            b'd' => {
                let items = self.pop_to_mark()?;
                Value::Dict(self.pairs(&items)?)
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?
            }
            // STACK_GLOBAL
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (&Value::Text(module), &Value::Text(name)) = (&self.values[module], &self.values[name]) else {
                    return Err(self.damaged("has a name that is no text"));
                };
                self.global(module, name)?
            }
            // BINPERSID
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?
            }

            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(self.foreign(&format!("to call `{}.{}`", shown(module), shown(name))));
            }
            // OBJ, NEWOBJ, NEWOBJ_EX
            b'o' | 0x81 | 0x92 => return Err(self.foreign("to make an object of a class")),
            // EXT1, EXT2, EXT4
            0x82..=0x84 => return Err(self.foreign("for a name in Python's registry of extensions")),
            b'P' => {
                let name = self.line()?;
                return Err(self.foreign(&format!("for the outside object `{}`", shown(name))));
            }
            _ => return Err(self.damaged(&format!("has the instruction {instruction:#04x}, which is not read,"))),
        })
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let taken = self.bytes[self.at..].get(..len).ok_or_else(|| self.damaged("ends"))?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn len32(&mut self) -> Result<usize> {
        let len = self.u32()?;
        usize::try_from(len).map_err(|_| self.damaged("ends"))
    }

    fn len64(&mut self) -> Result<usize> {
        let len = u64::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| self.damaged("ends"))
    }

    /// An integer of `len` bytes.
    fn long(&mut self, len: usize) -> Result<Value<'a>> {
        if len > 8 {
            return Err(self.damaged(&format!("has an integer of {len} bytes")));
        }
        let bytes = self.take(len)?;
        let fill = if bytes.last().is_some_and(|&top| top >= 0x80) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..len].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, len: usize) -> Result<Value<'a>> {
        let bytes = self.take(len)?;
        if len > MAX_TEXT {
            return Err(self.damaged(&format!("has a text of {len} bytes")));
        }
        std::str::from_utf8(bytes).map(Value::Text).map_err(|_| self.damaged("has a text that is not UTF-8"))
    }

    /// A text up to the end of its line.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let rest = &rest[..rest.len().min(MAX_TEXT)];
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| self.damaged("has an endless name"))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| self.damaged("has a text that is not UTF-8"))
    }

    /// The topmost value of the innermost open container.
    fn top(&self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&top) if self.stack.len() > floor => Ok(top),
            _ => Err(self.damaged("takes a value that is not there")),
        }
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("closes what it did not open"))?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self) -> Result<()> {
        match self.values[self.top()?] {
            Value::List => Ok(()),
            _ => Err(self.damaged("appends to what is no list")),
        }
    }

    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.damaged("has a key without a value"));
        }
        Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
    }

    fn insert(&mut self, items: &[Id]) -> Result<()> {
        let pairs = self.pairs(items)?;
        let top = self.top()?;
        let Value::Dict(entries) = &mut self.values[top] else {
            return Err(self.damaged("sets entries of what is no dictionary"));
        };
        entries.extend(pairs);
        Ok(())
    }

    fn global(&self, module: &'a str, name: &'a str) -> Result<Value<'a>> {
        Ok(Value::Global(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTypedTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", _) if DTYPES.contains(&name) => Global::Dtype(name),
            ("torch" | "torch.storage" | "torch.cuda", _) if is_storage_class(name) => Global::Storage(name),
            _ => return Err(self.foreign(&format!("for `{}.{}`", shown(module), shown(name)))),
        }))
    }

    /// What `torch` gives for the name of a storage: class, key, place and length.
    fn storage(&self, id: Id) -> Result<Value<'a>> {
        if let Value::Tuple(items) = &self.values[id]
            && let &[tag, class, key, _, len] = items.as_slice()
            && let Value::Text("storage") = self.values[tag]
            && let Value::Global(Global::Storage(class)) = self.values[class]
            && let (Value::Text(_), &Value::Int(len)) = (&self.values[key], &self.values[len])
        {
            return Ok(Value::Storage(Storage { class, key, len }));
        }
        Err(self.damaged("refers to something outside that is no storage"))
    }

    /// Does what the few known functions do, as far as it matters here.
    fn call(&mut self, function: Id, arguments: Id) -> Result<()> {
        let Value::Global(function) = self.values[function] else {
            return Err(self.foreign(&format!("to call {}", self.values[function].kind())));
        };
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err(self.damaged("calls a function without a tuple"));
        };
        let dtype = |id: Id| match self.values[id] {
            Value::Global(Global::Dtype(name)) => Some(name),
            _ => None,
        };
        let value = match (function, arguments.as_slice()) {
            (Global::OrderedDict, []) => Some(Value::Dict(Vec::new())),
            // Behind the strides: whether it needs gradients, hooks, and sometimes metadata.
            (Global::RebuildTensor, &[storage, offset, shape, strides, _, _, ..]) => {
                self.tensor([storage, offset, shape, strides], None)
            }
            (Global::RebuildTypedTensor, &[storage, offset, shape, strides, _, _, kind, ..]) => {
                dtype(kind).and_then(|dtype| self.tensor([storage, offset, shape, strides], Some(dtype)))
            }
            (Global::RebuildParameter, &[tensor, _, _]) if matches!(self.values[tensor], Value::Tensor(_)) => {
                self.stack.push(tensor);
                return Ok(());
            }
            (Global::Storage(name) | Global::Dtype(name), _) => {
                return Err(self.foreign(&format!("to call `torch.{}`", shown(name))));
            }
            _ => None,
        };
        let value = value.ok_or_else(|| self.damaged("rebuilds a tensor from unknown arguments"))?;
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
        Ok(())
    }

    fn tensor(&self, parts: [Id; 4], dtype: Option<&'a str>) -> Option<Value<'a>> {
        let [storage, _, shape, strides] = parts;
        match parts.map(|id| &self.values[id]) {
            [Value::Storage(_), &Value::Int(offset), Value::Tuple(_), Value::Tuple(_)] => {
                Some(Value::Tensor(Tensor { storage, offset, shape, strides, dtype }))
            }
            _ => None,
        }
    }
}

/// Whether it is the name of a class of storages, as `FloatStorage`.
fn is_storage_class(name: &str) -> bool {
    name.strip_suffix("Storage")
        .is_some_and(|kind| !kind.is_empty() && kind.len() <= 32 && kind.bytes().all(|c| c.is_ascii_alphanumeric()))
}
