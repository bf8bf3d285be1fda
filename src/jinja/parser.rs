//! Tokens to a tree, by Jinja 2's grammar. What nests is bounded, what chains is a loop.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ast::{
    Args, Block, Compare, Expr, ExprKind, For, Frame, Function, Macro, Math, Op, OpKind, Program, Stmt, StmtKind, Sym,
    Target, Var,
};
use super::error::{Res, TemplateError, limit, syntax, unsupported};
use super::lexer::{Lexer, Token};
use super::{filters, tests};

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

    // Statements.

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
                    let wanted = ends.iter().map(|end| format!("`{end}`")).collect::<Vec<_>>().join(" or ");
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
                let wanted = ends.iter().map(|end| format!("`{end}`")).collect::<Vec<_>>().join(" or ");
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

    // Expressions.

    fn expression(&mut self) -> Res<Expr> {
        self.nested(Self::conditional)
    }

    fn expression_of(&mut self, with_conditional: bool) -> Res<Expr> {
        if with_conditional { self.expression() } else { self.nested(Self::or) }
    }

    fn is_tuple_end(&self, end: Option<&str>) -> bool {
        matches!(self.token, Token::PrintEnd | Token::BlockEnd)
            || self.is_op(")")
            || end.is_some_and(|e| self.is_name(e))
    }

    /// Expressions with commas between them; one alone is itself. `parens`: none at all is an empty tuple.
    fn tuple(&mut self, with_conditional: bool, end: Option<&str>, parens: bool) -> Res<Expr> {
        self.tuple_with(end, parens, |parser| parser.expression_of(with_conditional))
    }

    fn simple_tuple(&mut self, end: Option<&str>, with_namespace: bool) -> Res<Expr> {
        self.tuple_with(end, false, |parser| parser.nested(|parser| parser.primary(with_namespace)))
    }

    fn tuple_with(
        &mut self,
        end: Option<&str>,
        parens: bool,
        mut parse: impl FnMut(&mut Self) -> Res<Expr>,
    ) -> Res<Expr> {
        let line = self.line;
        let mut items = Vec::new();
        let mut is_tuple = false;
        while !self.is_tuple_end(end) {
            items.push(parse(self)?);
            if !self.skip_op(",")? {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple {
            if let Some(item) = items.pop() {
                return Ok(item);
            }
            if !parens {
                return Err(syntax(format!("expected an expression, got `{}`", self.token.describe())).at(line));
            }
        }
        Ok(Expr { line, kind: ExprKind::Tuple(items) })
    }

    fn conditional(&mut self) -> Res<Expr> {
        let mut line = self.line;
        let mut expr = self.or()?;
        let mut links = 0;
        while self.skip_name("if")? {
            links += 1;
            if links > MAX_NESTING {
                return Err(limit(format!("more than {MAX_NESTING} conditions on one value")).at(line));
            }
            let test = Box::new(self.or()?);
            let other = if self.skip_name("else")? { Some(Box::new(self.nested(Self::conditional)?)) } else { None };
            expr = Expr { line, kind: ExprKind::Cond { test, then: Box::new(expr), other } };
            line = self.line;
        }
        Ok(expr)
    }

    fn or(&mut self) -> Res<Expr> {
        self.logic("or", Self::and, ExprKind::Or)
    }

    fn and(&mut self) -> Res<Expr> {
        self.logic("and", Self::not, ExprKind::And)
    }

    fn logic(&mut self, word: &str, part: fn(&mut Self) -> Res<Expr>, kind: fn(Vec<Expr>) -> ExprKind) -> Res<Expr> {
        let line = self.line;
        let first = part(self)?;
        if !self.is_name(word) {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_name(word)? {
            parts.push(part(self)?);
        }
        Ok(Expr { line, kind: kind(parts) })
    }

    fn not(&mut self) -> Res<Expr> {
        let line = self.line;
        if self.skip_name("not")? {
            return Ok(Expr { line, kind: ExprKind::Not(Box::new(self.nested(Self::not)?)) });
        }
        self.compare()
    }

    fn compare(&mut self) -> Res<Expr> {
        let line = self.line;
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let not_in = self.is_name("not") && matches!(self.peek()?, Token::Name(name) if name == "in");
            let op = match &self.token {
                Token::Op("==") => Compare::Eq,
                Token::Op("!=") => Compare::Ne,
                Token::Op("<") => Compare::Lt,
                Token::Op("<=") => Compare::Le,
                Token::Op(">") => Compare::Gt,
                Token::Op(">=") => Compare::Ge,
                Token::Name(name) if name == "in" => Compare::In,
                _ if not_in => {
                    self.next()?;
                    Compare::NotIn
                }
                _ => break,
            };
            self.next()?;
            rest.push((op, self.sum()?));
        }
        Ok(if rest.is_empty() { first } else { Expr { line, kind: ExprKind::Compare(Box::new(first), rest) } })
    }

    fn sum(&mut self) -> Res<Expr> {
        self.math(Self::concat, |op| match op {
            "+" => Some(Math::Add),
            "-" => Some(Math::Sub),
            _ => None,
        })
    }

    fn concat(&mut self) -> Res<Expr> {
        let line = self.line;
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~")? {
            parts.push(self.product()?);
        }
        Ok(Expr { line, kind: ExprKind::Concat(parts) })
    }

    fn product(&mut self) -> Res<Expr> {
        self.math(Self::power, |op| match op {
            "*" => Some(Math::Mul),
            "/" => Some(Math::Div),
            "//" => Some(Math::FloorDiv),
            "%" => Some(Math::Mod),
            _ => None,
        })
    }

    fn power(&mut self) -> Res<Expr> {
        self.math(|parser| parser.unary(true), |op| (op == "**").then_some(Math::Pow))
    }

    fn math(&mut self, part: fn(&mut Self) -> Res<Expr>, operator: fn(&str) -> Option<Math>) -> Res<Expr> {
        let line = self.line;
        let first = part(self)?;
        let mut rest = Vec::new();
        while let Token::Op(op) = self.token
            && let Some(op) = operator(op)
        {
            self.next()?;
            rest.push((op, part(self)?));
        }
        Ok(if rest.is_empty() { first } else { Expr { line, kind: ExprKind::Math(Box::new(first), rest) } })
    }

    fn unary(&mut self, with_filter: bool) -> Res<Expr> {
        let line = self.line;
        let base = if self.skip_op("-")? {
            let operand = Box::new(self.nested(|parser| parser.unary(false))?);
            Expr { line, kind: ExprKind::Negative(operand) }
        } else if self.skip_op("+")? {
            let operand = Box::new(self.nested(|parser| parser.unary(false))?);
            Expr { line, kind: ExprKind::Positive(operand) }
        } else {
            self.primary(false)?
        };
        let mut ops = Vec::new();
        self.postfix(&mut ops)?;
        if with_filter {
            loop {
                if self.is_op("|") {
                    ops.append(&mut self.filters(false)?);
                } else if self.is_name("is") {
                    let test = self.test()?;
                    ops.push(test);
                } else if self.is_op("(") {
                    let line = self.line;
                    ops.push(Op { line, kind: OpKind::Call(self.arguments()?) });
                } else {
                    break;
                }
            }
        }
        Ok(with_ops(base, ops))
    }

    fn primary(&mut self, with_namespace: bool) -> Res<Expr> {
        let line = self.line;
        let kind = match self.next()? {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => ExprKind::Bool(true),
                "false" | "False" => ExprKind::Bool(false),
                "none" | "None" => ExprKind::None,
                _ => {
                    let symbol = self.symbol(&name);
                    if with_namespace && self.skip_op(".")? {
                        let attr = self.any_name()?;
                        let base = Box::new(Expr { line, kind: ExprKind::Name(symbol, Var::default()) });
                        let kind = OpKind::Attr(self.symbol(&attr));
                        ExprKind::Postfix(base, vec![Op { line, kind }])
                    } else {
                        ExprKind::Name(symbol, Var::default())
                    }
                }
            },
            Token::Str(mut text) => {
                while let Token::Str(more) = &self.token {
                    text.push_str(more);
                    self.next()?;
                }
                ExprKind::Str(self.symbol(&text))
            }
            Token::Int(value) => ExprKind::Int(value),
            Token::Float(value) => ExprKind::Float(value),
            Token::Op("(") => {
                let inner = self.tuple(true, None, true)?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Token::Op("[") => {
                let mut items = Vec::new();
                while !self.is_op("]") {
                    items.push(self.expression()?);
                    if !self.is_op("]") {
                        self.expect_op(",")?;
                    }
                }
                self.next()?;
                ExprKind::List(items)
            }
            Token::Op("{") => {
                let mut entries = Vec::new();
                while !self.is_op("}") {
                    let key = self.expression()?;
                    self.expect_op(":")?;
                    entries.push((key, self.expression()?));
                    if !self.is_op("}") {
                        self.expect_op(",")?;
                    }
                }
                self.next()?;
                ExprKind::Dict(entries)
            }
            Token::End => return Err(syntax("unexpected end of template").at(line)),
            other => return Err(syntax(format!("unexpected `{}`", other.describe())).at(line)),
        };
        Ok(Expr { line, kind })
    }

    fn postfix(&mut self, ops: &mut Vec<Op>) -> Res<()> {
        loop {
            let line = self.line;
            let kind = if self.skip_op(".")? {
                match self.next()? {
                    Token::Name(name) => OpKind::Attr(self.symbol(&name)),
                    Token::Int(number) => OpKind::Item(Expr { line, kind: ExprKind::Int(number) }),
                    _ => return Err(syntax("expected name or number").at(line)),
                }
            } else if self.skip_op("[")? {
                self.subscript(line)?
            } else if self.is_op("(") {
                OpKind::Call(self.arguments()?)
            } else {
                return Ok(());
            };
            ops.push(Op { line, kind });
        }
    }

    fn subscript(&mut self, line: u32) -> Res<OpKind> {
        let (mut items, mut slice) = (Vec::new(), None);
        while !self.is_op("]") {
            if !items.is_empty() || slice.is_some() {
                self.expect_op(",")?;
            }
            if slice.is_some() {
                return Err(unsupported("a slice with a comma").at(line));
            }
            let first = if self.is_op(":") { None } else { Some(self.expression()?) };
            if !self.skip_op(":")? {
                items.extend(first);
                continue;
            }
            let mut parts = [first, None, None];
            let ends = |parser: &Self| parser.is_op("]") || parser.is_op(",");
            if !self.is_op(":") && !ends(self) {
                parts[1] = Some(self.expression()?);
            }
            if self.skip_op(":")? && !ends(self) {
                parts[2] = Some(self.expression()?);
            }
            slice = Some(parts);
        }
        self.next()?;
        Ok(match (slice, items.len()) {
            (Some(parts), 0) => OpKind::Slice(Box::new(parts)),
            (Some(_), _) => return Err(unsupported("a slice with a comma").at(line)),
            (None, 1) => OpKind::Item(items.remove(0)),
            (None, _) => OpKind::Item(Expr { line, kind: ExprKind::Tuple(items) }),
        })
    }

    fn arguments(&mut self) -> Res<Args> {
        let line = self.line;
        let wrong = || syntax("invalid syntax for a function call").at(line);
        let mut args = Args::default();
        self.expect_op("(")?;
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            if self.skip_op("*")? {
                if args.star.is_some() || args.star_star.is_some() {
                    return Err(wrong());
                }
                args.star = Some(Box::new(self.expression()?));
            } else if self.skip_op("**")? {
                if args.star_star.is_some() {
                    return Err(wrong());
                }
                args.star_star = Some(Box::new(self.expression()?));
            } else if matches!(self.token, Token::Name(_)) && *self.peek()? == Token::Op("=") {
                let name = self.any_name()?;
                self.next()?;
                let name = self.symbol(&name);
                if args.star_star.is_some() || args.named.iter().any(|(other, _)| *other == name) {
                    return Err(wrong());
                }
                args.named.push((name, self.expression()?));
                if args.named.len() > MAX_NESTING {
                    return Err(limit(format!("a call has more than {MAX_NESTING} named arguments")).at(line));
                }
            } else {
                if args.star.is_some() || args.star_star.is_some() || !args.named.is_empty() {
                    return Err(wrong());
                }
                args.positional.push(self.expression()?);
            }
        }
        self.expect_op(")")?;
        Ok(args)
    }

    fn optional_arguments(&mut self) -> Res<Args> {
        if self.is_op("(") { self.arguments() } else { Ok(Args::default()) }
    }

    /// `|a(b)|c`; with `at_name`, the first one without its bar.
    fn filters(&mut self, mut at_name: bool) -> Res<Vec<Op>> {
        let mut ops = Vec::new();
        while at_name || self.skip_op("|")? {
            at_name = false;
            let line = self.line;
            let name = self.dotted_name()?;
            let kind = OpKind::Filter(self.symbol(&name), filters::find(&name), self.optional_arguments()?);
            ops.push(Op { line, kind });
        }
        Ok(ops)
    }

    fn dotted_name(&mut self) -> Res<String> {
        let mut name = self.any_name()?;
        while self.skip_op(".")? {
            name.push('.');
            name.push_str(&self.any_name()?);
        }
        Ok(name)
    }

    fn test(&mut self) -> Res<Op> {
        let line = self.line;
        self.next()?;
        let negated = self.skip_name("not")?;
        let name = self.dotted_name()?;
        let args = match &self.token {
            Token::Op("(") => self.arguments()?,
            Token::Name(word) if matches!(word.as_str(), "else" | "or" | "and") => Args::default(),
            Token::Name(word) if word == "is" => {
                return Err(syntax("you cannot chain multiple tests with is").at(line));
            }
            Token::Name(_) | Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{") => {
                let operand = self.nested(|parser| {
                    let base = parser.primary(false)?;
                    let mut ops = Vec::new();
                    parser.postfix(&mut ops)?;
                    Ok(with_ops(base, ops))
                })?;
                Args { positional: vec![operand], ..Args::default() }
            }
            _ => Args::default(),
        };
        Ok(Op { line, kind: OpKind::Test(self.symbol(&name), tests::find(&name), args, negated) })
    }
}

fn index(position: usize) -> u32 {
    // A template has at most as many statements as bytes.
    u32::try_from(position).unwrap_or(u32::MAX)
}

fn is_constant(name: &str) -> bool {
    matches!(name, "true" | "True" | "false" | "False" | "none" | "None")
}

fn with_ops(base: Expr, ops: Vec<Op>) -> Expr {
    if ops.is_empty() {
        return base;
    }
    Expr { line: base.line, kind: ExprKind::Postfix(Box::new(base), ops) }
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
