//! Tokens to a tree, by Jinja 2's grammar. What nests is bounded, what chains is a loop.

mod expressions;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ast::{
    Block, Expr, ExprKind, For, Frame, Function, Macro, Op, OpKind, Program, Stmt, StmtKind, Sym, Target, Var,
};
use super::error::{Res, TemplateError, limit, syntax};
use super::lexer::{Lexer, Token};

/// How deep expressions and blocks may nest; Python gives up at about as much.
const MAX_NESTING: usize = 200;

pub(super) struct Parser<'s> {
    lexer: Lexer<'s>,
    token: Token,
    line: u32,
    /// The token after the current one, if it has been looked at.
    ahead: Option<(Token, u32)>,
    program: Program,
    symbols: HashMap<Arc<str>, Sym>,
    nesting: usize,
    /// Tags that are open, for errors.
    tags: Vec<(String, u32)>,
    /// How many loops could be left by `break` here.
    loops: usize,
    scoped_blocks: usize,
    blocks: HashSet<Sym>,
}

/// Parses a template (see [`super::lexer::normalized`]); variables are not resolved yet.
///
/// # Errors
/// If Jinja 2 would not take it, or this engine does not.
pub(super) fn parse(source: &str) -> Res<Program> {
    let mut parser = Parser {
        lexer: Lexer::new(source),
        token: Token::End,
        line: 1,
        ahead: None,
        program: Program::default(),
        symbols: HashMap::new(),
        nesting: 0,
        tags: Vec::new(),
        loops: 0,
        scoped_blocks: 0,
        blocks: HashSet::new(),
    };
    parser.next().and_then(|_| parser.body(&[])).map(|body| parser.program.root.body = body).map_err(|error| {
        let line = parser.line;
        error.at(line)
    })?;
    Ok(parser.program)
}

impl Parser<'_> {
    /// Goes on; returns what was there.
    fn next(&mut self) -> Res<Token> {
        let (token, line) = match self.ahead.take() {
            Some(ahead) => ahead,
            None => self.lexer.next()?,
        };
        self.line = line;
        Ok(std::mem::replace(&mut self.token, token))
    }

    fn peek(&mut self) -> Res<&Token> {
        if self.ahead.is_none() {
            self.ahead = Some(self.lexer.next()?);
        }
        Ok(self.ahead.as_ref().map_or(&Token::End, |(token, _)| token))
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(&self.token, Token::Op(found) if *found == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(&self.token, Token::Name(found) if found == name)
    }

    fn skip_op(&mut self, op: &str) -> Res<bool> {
        let found = self.is_op(op);
        if found {
            self.next()?;
        }
        Ok(found)
    }

    fn skip_name(&mut self, name: &str) -> Res<bool> {
        let found = self.is_name(name);
        if found {
            self.next()?;
        }
        Ok(found)
    }

    fn unexpected(&self, wanted: &str) -> TemplateError {
        let message = match self.token {
            Token::End => format!("unexpected end of template, expected `{wanted}`"),
            _ => format!("expected token `{wanted}`, got `{}`", self.token.describe()),
        };
        syntax(message).at(self.line)
    }

    fn expect_op(&mut self, op: &str) -> Res<()> {
        if self.skip_op(op)? { Ok(()) } else { Err(self.unexpected(op)) }
    }

    fn expect_name(&mut self, name: &str) -> Res<()> {
        if self.skip_name(name)? { Ok(()) } else { Err(self.unexpected(name)) }
    }

    fn expect_block_end(&mut self) -> Res<()> {
        if self.token != Token::BlockEnd {
            return Err(self.unexpected("end of statement block"));
        }
        self.next().map(drop)
    }

    fn any_name(&mut self) -> Res<String> {
        match &mut self.token {
            Token::Name(name) => {
                let name = std::mem::take(name);
                self.next()?;
                Ok(name)
            }
            _ => Err(self.unexpected("name")),
        }
    }

    fn symbol(&mut self, text: &str) -> Sym {
        if let Some(&symbol) = self.symbols.get(text) {
            return symbol;
        }
        let symbol = self.program.symbol(text);
        self.symbols.insert(Arc::clone(&self.program.strings[symbol as usize]), symbol);
        symbol
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        if self.nesting >= MAX_NESTING {
            return Err(limit(format!("the template nests more than {MAX_NESTING} levels deep")).at(self.line));
        }
        self.nesting += 1;
        let parsed = parse(self);
        self.nesting -= 1;
        parsed
    }

    /// Statements up to one of the tags in `ends`, at which the parser then stands; or to the end of the template.
    fn body(&mut self, ends: &[&str]) -> Res<Vec<Stmt>> {
        self.nested(|parser| parser.body_here(ends))
    }

    fn body_here(&mut self, ends: &[&str]) -> Res<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line;
            match self.next()? {
                Token::Data(text) => {
                    let kind = StmtKind::Text(self.symbol(&text));
                    body.push(Stmt { line, kind });
                }
                Token::PrintBegin => {
                    let line = self.line;
                    let kind = StmtKind::Print(vec![self.tuple(true, None, false)?]);
                    body.push(Stmt { line, kind });
                    if self.token != Token::PrintEnd {
                        return Err(self.unexpected("end of print statement"));
                    }
                    self.next()?;
                }
                Token::BlockBegin => {
                    let line = self.line;
                    let Token::Name(name) = &self.token else {
                        return Err(syntax("tag name expected").at(line));
                    };
                    if ends.contains(&name.as_str()) {
                        return Ok(body);
                    }
                    let name = name.clone();
                    self.tags.push((name.clone(), line));
                    if let Some(kind) = self.statement(&name, ends)? {
                        body.push(Stmt { line, kind });
                    }
                    self.tags.pop();
                    self.expect_block_end()?;
                }
                _ if ends.is_empty() => return Ok(body),
                _ => {
                    let wanted = alternatives(ends);
                    let open = self.tags.last().map(|(tag, line)| format!(" for the `{tag}` of line {line}"));
                    let open = open.unwrap_or_default();
                    return Err(syntax(format!("unexpected end of template, expected {wanted}{open}")).at(line));
                }
            }
        }
    }

    /// A body after the tag's own end, up to the closing tag, whose name is passed.
    fn block_body(&mut self, ends: &[&str]) -> Res<Vec<Stmt>> {
        self.skip_op(":")?;
        self.expect_block_end()?;
        self.body(ends)
    }

    fn closed_body(&mut self, end: &str) -> Res<Vec<Stmt>> {
        let body = self.block_body(&[end])?;
        self.next()?;
        Ok(body)
    }

    /// A body that is a function of its own: loops outside cannot be left from it.
    fn function_body(&mut self, end: &str) -> Res<Function> {
        let loops = std::mem::take(&mut self.loops);
        let body = self.closed_body(end);
        self.loops = loops;
        Ok(Function { body: body?, ..Function::default() })
    }

    fn statement(&mut self, tag: &str, ends: &[&str]) -> Res<Option<StmtKind>> {
        let line = self.line;
        self.next()?;
        Ok(Some(match tag {
            "for" => self.for_loop(line)?,
            "if" => self.if_chain()?,
            "set" => self.set()?,
            "with" => self.with()?,
            "macro" => {
                let name = self.target_name()?;
                let (params, defaults) = self.signature()?;
                let function = self.function_body("endmacro")?;
                StmtKind::Macro(self.add_macro(Some(name), params, defaults, function), Var::default(), false)
            }
            "call" => {
                let (params, defaults) = if self.is_op("(") { self.signature()? } else { (Vec::new(), Vec::new()) };
                let call = self.expression()?;
                if !matches!(&call.kind, ExprKind::Postfix(_, ops) if matches!(ops.last(), Some(Op { kind: OpKind::Call(_), .. })))
                {
                    return Err(syntax("expected call").at(line));
                }
                let function = self.function_body("endcall")?;
                StmtKind::Call(self.add_macro(None, params, defaults, function), call)
            }
            "generation" => {
                let function = self.function_body("endgeneration")?;
                StmtKind::Generation(self.add_macro(None, Vec::new(), Vec::new(), function))
            }
            "filter" => {
                let ops = self.filters(true)?;
                StmtKind::FilterBlock { frame: Frame::default(), ops, body: self.closed_body("endfilter")? }
            }
            "autoescape" => {
                let value = self.expression()?;
                StmtKind::Autoescape { frame: Frame::default(), value, body: self.closed_body("endautoescape")? }
            }
            "print" => {
                let mut values = Vec::new();
                while self.token != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    values.push(self.expression()?);
                }
                StmtKind::Print(values)
            }
            "block" => self.block(line)?,
            "break" | "continue" => {
                if self.loops == 0 {
                    return Err(syntax(format!("`{tag}` outside a loop")).at(line));
                }
                if tag == "break" { StmtKind::Break } else { StmtKind::Continue }
            }
            "include" | "import" | "from" | "extends" => self.loader(tag)?,
            _ => {
                self.tags.pop();
                let wanted = alternatives(ends);
                let wanted = if wanted.is_empty() { wanted } else { format!(", expected {wanted}") };
                return Err(syntax(format!("unknown tag `{tag}`{wanted}")).at(line));
            }
        }))
    }

    fn for_loop(&mut self, line: u32) -> Res<StmtKind> {
        let target = self.target(Some("in"), false)?;
        self.expect_name("in")?;
        let iter = self.tuple(false, Some("recursive"), false)?;
        let test = if self.skip_name("if")? { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive")?;
        let outer = self.loops;
        self.loops = if recursive { 1 } else { outer + 1 };
        let scoped_blocks = self.scoped_blocks;
        let body = self.block_body(&["endfor", "else"]);
        self.loops = if recursive { 0 } else { outer };
        let body = body?;
        let other = if matches!(self.next()?, Token::Name(end) if end == "else") {
            self.closed_body("endfor")?
        } else {
            Vec::new()
        };
        self.loops = outer;
        let test = test.map(|test| (target.clone(), test, Frame::default()));
        let extended = recursive || self.scoped_blocks > scoped_blocks;
        self.program.loops.push(For { line, target, iter, body, other, recursive, extended, test, ..For::default() });
        Ok(StmtKind::For(index(self.program.loops.len() - 1)))
    }

    fn if_chain(&mut self) -> Res<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, None, false)?;
            let body = self.block_body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match self.next()? {
                Token::Name(end) if end == "elif" => {}
                Token::Name(end) if end == "else" => {
                    return Ok(StmtKind::If(branches, self.closed_body("endif")?));
                }
                _ => return Ok(StmtKind::If(branches, Vec::new())),
            }
        }
    }

    fn set(&mut self) -> Res<StmtKind> {
        let target = self.target(None, true)?;
        if self.skip_op("=")? {
            return Ok(StmtKind::Set(target, self.tuple(true, None, false)?, false));
        }
        let ops = self.filters(false)?;
        let body = self.closed_body("endset")?;
        Ok(StmtKind::SetBlock { frame: Frame::default(), target, ops, body, top: false })
    }

    fn with(&mut self) -> Res<StmtKind> {
        let mut targets = Vec::new();
        while self.token != Token::BlockEnd {
            if !targets.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(None, false)?;
            self.expect_op("=")?;
            targets.push((target, self.expression()?));
        }
        Ok(StmtKind::With { frame: Frame::default(), targets, body: self.closed_body("endwith")? })
    }

    fn block(&mut self, line: u32) -> Res<StmtKind> {
        let name = self.any_name()?;
        let scoped = self.skip_name("scoped")?;
        let required = self.skip_name("required")?;
        if self.is_op("-") {
            return Err(syntax("block names may not contain hyphens").at(line));
        }
        self.scoped_blocks += usize::from(scoped);
        let function = self.function_body("endblock")?;
        let blank = |stmt: &Stmt| match stmt.kind {
            StmtKind::Text(text) => self.program.strings[text as usize].chars().all(super::text::is_space),
            _ => false,
        };
        if required && !function.body.iter().all(blank) {
            return Err(syntax("required blocks can only contain comments or white space").at(line));
        }
        self.skip_name(&name)?;
        let name = self.symbol(&name);
        if !self.blocks.insert(name) {
            return Err(syntax(format!("block `{}` is defined twice", self.program.strings[name as usize])).at(line));
        }
        self.program.blocks.push(Block { name, function, scoped, required });
        Ok(StmtKind::Block(index(self.program.blocks.len() - 1), None))
    }

    /// `include` and the like, which fail when they are reached: there is no loader.
    fn loader(&mut self, tag: &str) -> Res<StmtKind> {
        let template = self.expression()?;
        let mut names = Vec::new();
        if tag == "include" && self.skip_name("ignore")? {
            self.expect_name("missing")?;
        }
        if tag == "import" {
            self.expect_name("as")?;
            names.push((self.target_name()?, Var::default()));
        }
        if tag == "from" {
            self.expect_name("import")?;
            loop {
                if self.is_name("with") || self.is_name("without") {
                    break;
                }
                let mut name = self.target_name()?;
                if self.skip_name("as")? {
                    name = self.target_name()?;
                }
                names.push((name, Var::default()));
                if !self.skip_op(",")? {
                    break;
                }
            }
        }
        if tag != "extends" && (self.is_name("with") || self.is_name("without")) {
            self.next()?;
            self.expect_name("context")?;
        }
        Ok(StmtKind::Loader(template, names))
    }

    fn add_macro(&mut self, name: Option<Sym>, params: Vec<Sym>, defaults: Vec<Expr>, function: Function) -> u32 {
        let params = params.into_iter().map(|param| (param, 0)).collect();
        self.program.macros.push(Macro { name, params, defaults, function, ..Macro::default() });
        index(self.program.macros.len() - 1)
    }

    fn signature(&mut self) -> Res<(Vec<Sym>, Vec<Expr>)> {
        let (mut params, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.target_name()?;
            if params.contains(&name) {
                return Err(syntax("two parameters have the same name").at(self.line));
            }
            if params.len() >= MAX_NESTING {
                return Err(limit(format!("a macro has more than {MAX_NESTING} parameters")).at(self.line));
            }
            params.push(name);
            if self.skip_op("=")? {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return Err(syntax("non-default argument follows default argument").at(self.line));
            }
        }
        self.expect_op(")")?;
        Ok((params, defaults))
    }

    fn target_name(&mut self) -> Res<Sym> {
        let line = self.line;
        let name = self.any_name()?;
        if is_constant(&name) {
            return Err(syntax(format!("can't assign to `{name}`")).at(line));
        }
        Ok(self.symbol(&name))
    }

    fn target(&mut self, end: Option<&str>, with_namespace: bool) -> Res<Target> {
        let line = self.line;
        let expr = self.simple_tuple(end, with_namespace)?;
        into_target(expr).ok_or_else(|| syntax("can't assign to this expression").at(line))
    }
}

fn index(position: usize) -> u32 {
    // A template has at most as many statements as bytes.
    u32::try_from(position).unwrap_or(u32::MAX)
}

/// Tags for a message.
fn alternatives(ends: &[&str]) -> String {
    ends.iter().map(|end| format!("`{end}`")).collect::<Vec<_>>().join(" or ")
}

fn is_constant(name: &str) -> bool {
    matches!(name, "true" | "True" | "false" | "False" | "none" | "None")
}

fn into_target(expr: Expr) -> Option<Target> {
    match expr.kind {
        ExprKind::Name(name, var) => Some(Target::Name(name, var)),
        ExprKind::Tuple(items) => items.into_iter().map(into_target).collect::<Option<_>>().map(Target::Tuple),
        ExprKind::Postfix(base, mut ops) => match (base.kind, ops.pop(), ops.is_empty()) {
            (ExprKind::Name(name, var), Some(Op { kind: OpKind::Attr(attr), .. }), true) => {
                Some(Target::Attr(name, var, attr))
            }
            _ => None,
        },
        _ => None,
    }
}
