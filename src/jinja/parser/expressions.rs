//! Expressions, from the loosest operator to the tightest.

use super::super::ast::{Args, Compare, Expr, ExprKind, Math, Op, OpKind, Var};
use super::super::error::{Res, limit, syntax, unsupported};
use super::super::lexer::Token;
use super::super::{filters, tests};
use super::{MAX_NESTING, Parser};

impl Parser<'_> {
    pub(super) fn expression(&mut self) -> Res<Expr> {
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
    pub(super) fn tuple(&mut self, with_conditional: bool, end: Option<&str>, parens: bool) -> Res<Expr> {
        self.tuple_with(end, parens, |parser| parser.expression_of(with_conditional))
    }

    pub(super) fn simple_tuple(&mut self, end: Option<&str>, with_namespace: bool) -> Res<Expr> {
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
        self.chain(|parser| parser.skip_name("or"), Self::and, ExprKind::Or)
    }

    fn and(&mut self) -> Res<Expr> {
        self.chain(|parser| parser.skip_name("and"), Self::not, ExprKind::And)
    }

    /// Parts with a word or an operator between them, which `skip` skips; one alone is itself.
    fn chain(
        &mut self,
        skip: fn(&mut Self) -> Res<bool>,
        part: fn(&mut Self) -> Res<Expr>,
        kind: fn(Vec<Expr>) -> ExprKind,
    ) -> Res<Expr> {
        let line = self.line;
        let first = part(self)?;
        if !skip(self)? {
            return Ok(first);
        }
        let mut parts = vec![first, part(self)?];
        while skip(self)? {
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
        self.chain(|parser| parser.skip_op("~"), Self::product, ExprKind::Concat)
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
    pub(super) fn filters(&mut self, mut at_name: bool) -> Res<Vec<Op>> {
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

fn with_ops(base: Expr, ops: Vec<Op>) -> Expr {
    if ops.is_empty() {
        return base;
    }
    Expr { line: base.line, kind: ExprKind::Postfix(Box::new(base), ops) }
}
