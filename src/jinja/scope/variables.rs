//! Names to variables: every name of a statement gets its place, scope by scope.

use std::collections::HashSet;
use std::mem;

use super::super::ast::{Args, Expr, ExprKind, For, Macro, Op, OpKind, Stmt, StmtKind, Sym, Target};
use super::super::error::{Res, syntax};
use super::{Resolver, Site};

impl Resolver<'_> {
    pub(super) fn body(&mut self, body: &mut [Stmt], site: Site) -> Res<()> {
        body.iter_mut().try_for_each(|stmt| {
            let line = stmt.line;
            self.statement(stmt, site).map_err(|error| error.at(line))
        })
    }

    fn statement(&mut self, stmt: &mut Stmt, site: Site) -> Res<()> {
        let inner = Site { top: false, soft: false };
        match &mut stmt.kind {
            StmtKind::Print(values) => values.iter_mut().try_for_each(|value| self.expr(value, site.soft))?,
            StmtKind::Set(target, value, top) => {
                *top = site.top;
                self.expr(value, site.soft)?;
                self.target(target, true)?;
            }
            StmtKind::SetBlock { frame, target, ops, body, top } => {
                *top = site.top;
                self.target(target, true)?;
                self.open();
                self.analyze(body)?;
                self.body(body, inner)?;
                // The filter is not analysed with the block; its names are looked up there.
                self.analyze_ops(ops)?;
                self.ops(ops, false)?;
                *frame = self.close();
            }
            StmtKind::If(branches, other) => {
                let soft = Site { soft: true, ..site };
                for (test, body) in branches {
                    self.expr(test, true)?;
                    self.body(body, soft)?;
                }
                self.body(other, soft)?;
            }
            StmtKind::For(id) => {
                let mut part = mem::take(&mut self.program.loops[*id as usize]);
                self.for_loop(&mut part, site)?;
                self.program.loops[*id as usize] = part;
            }
            StmtKind::With { frame, targets, body } => {
                for (_, value) in targets.iter_mut() {
                    self.expr(value, site.soft)?;
                }
                self.open();
                for (target, _) in targets.iter() {
                    self.analyze_target(target, true);
                }
                self.analyze(body)?;
                targets.iter_mut().try_for_each(|(target, _)| self.target(target, false))?;
                self.body(body, inner)?;
                *frame = self.close();
            }
            StmtKind::Autoescape { frame, value, body } => {
                self.open();
                self.analyze_expr(value)?;
                self.analyze(body)?;
                self.expr(value, false)?;
                self.body(body, inner)?;
                *frame = self.close();
            }
            StmtKind::FilterBlock { frame, ops, body } => {
                self.open();
                self.analyze(body)?;
                self.analyze_ops(ops)?;
                self.body(body, inner)?;
                self.ops(ops, false)?;
                *frame = self.close();
            }
            StmtKind::Macro(id, var, top) => {
                *top = site.top;
                self.macro_body(*id)?;
                if let Some(name) = self.program.macros[*id as usize].name {
                    *var = self.var(name);
                }
            }
            StmtKind::Call(id, call) => {
                self.macro_body(*id)?;
                self.expr(call, site.soft)?;
            }
            StmtKind::Generation(id) => self.macro_body(*id)?,
            StmtKind::Block(id, seen) => {
                if self.program.blocks[*id as usize].scoped {
                    let names: HashSet<Sym> = self.scopes.iter().flat_map(|s| s.stored.iter().copied()).collect();
                    self.visits += names.len() * 8;
                    self.visit()?;
                    *seen = Some(names.into_iter().map(|name| (name, self.var(name))).collect());
                }
            }
            StmtKind::Loader(value, names) => {
                self.expr(value, site.soft)?;
                for (name, var) in names {
                    *var = self.var(*name);
                }
            }
            StmtKind::Text(_) | StmtKind::Break | StmtKind::Continue => {}
        }
        Ok(())
    }

    fn for_loop(&mut self, part: &mut For, site: Site) -> Res<()> {
        let inner = Site { top: false, soft: false };
        let name = self.special["loop"];
        let extended = part.extended || self.undeclared(&part.body, &[name])?.contains(&name);
        self.in_loop += 1;
        if let Some((target, test, frame)) = &mut part.test {
            self.open();
            self.analyze_target(target, true);
            self.analyze_expr(test)?;
            self.target(target, true)?;
            self.expr(test, false)?;
            *frame = self.close();
        }
        self.expr(&mut part.iter, site.soft)?;
        if part.recursive {
            self.open_function();
        }
        self.open();
        part.loop_slot = extended.then(|| self.declare(name));
        self.analyze_target(&part.target, true);
        self.analyze(&part.body)?;
        self.target(&mut part.target, true)?;
        self.body(&mut part.body, inner)?;
        part.frame = self.close();
        self.open();
        self.analyze(&part.other)?;
        self.body(&mut part.other, inner)?;
        part.other_frame = self.close();
        if part.recursive {
            part.num_slots = self.slots.pop().unwrap_or(0);
        }
        self.in_loop -= 1;
        Ok(())
    }

    fn macro_body(&mut self, id: u32) -> Res<()> {
        let mut part = mem::take(&mut self.program.macros[id as usize]);
        let [caller, kwargs, varargs] = ["caller", "kwargs", "varargs"].map(|name| self.special[name]);
        let unbound = self.undeclared(&part.function.body, &[caller, kwargs, varargs])?;
        let has = |name: Sym, part: &Macro| part.params.iter().any(|(param, _)| *param == name);
        self.open_function();
        self.open();
        for at in 0..part.params.len() {
            part.params[at].1 = self.declare(part.params[at].0);
        }
        if unbound.contains(&caller) {
            if has(caller, &part) {
                let required = part.params.len() - part.defaults.len();
                if part.params[..required].iter().any(|(param, _)| *param == caller) {
                    return Err(syntax("the special `caller` argument must be omitted or be given a default"));
                }
            } else {
                part.caller = Some(self.declare(caller));
            }
            part.accesses_caller = true;
        }
        if unbound.contains(&kwargs) && !has(kwargs, &part) {
            part.kwargs = Some(self.declare(kwargs));
        }
        if unbound.contains(&varargs) && !has(varargs, &part) {
            part.varargs = Some(self.declare(varargs));
        }
        part.explicit_caller = has(caller, &part);
        self.analyze_exprs(&part.defaults)?;
        self.analyze(&part.function.body)?;
        part.defaults.iter_mut().try_for_each(|value| self.expr(value, false))?;
        self.body(&mut part.function.body, Site { top: false, soft: false })?;
        part.function.frame = self.close();
        part.function.num_slots = self.slots.pop().unwrap_or(0);
        self.program.macros[id as usize] = part;
        Ok(())
    }

    fn target(&mut self, target: &mut Target, may_be_loop: bool) -> Res<()> {
        match target {
            Target::Name(name, var) => {
                if may_be_loop && self.in_loop > 0 && *name == self.special["loop"] {
                    return Err(syntax("can't assign to the special loop variable in a for loop"));
                }
                *var = self.var(*name);
            }
            Target::Attr(name, var, _) => *var = self.var(*name),
            Target::Tuple(items) => items.iter_mut().try_for_each(|item| self.target(item, may_be_loop))?,
        }
        Ok(())
    }

    fn exprs(&mut self, exprs: &mut [Expr], soft: bool) -> Res<()> {
        exprs.iter_mut().try_for_each(|expr| self.expr(expr, soft))
    }

    fn expr(&mut self, expr: &mut Expr, soft: bool) -> Res<()> {
        self.visit()?;
        match &mut expr.kind {
            ExprKind::None | ExprKind::Bool(_) | ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) => Ok(()),
            ExprKind::Name(name, var) => {
                *var = self.var(*name);
                Ok(())
            }
            ExprKind::List(items)
            | ExprKind::Tuple(items)
            | ExprKind::Concat(items)
            | ExprKind::And(items)
            | ExprKind::Or(items) => self.exprs(items, soft),
            ExprKind::Dict(entries) => entries.iter_mut().try_for_each(|(key, value)| {
                self.expr(key, soft)?;
                self.expr(value, soft)
            }),
            ExprKind::Negative(operand) | ExprKind::Positive(operand) | ExprKind::Not(operand) => {
                self.expr(operand, soft)
            }
            ExprKind::Math(first, rest) => {
                self.expr(first, soft)?;
                rest.iter_mut().try_for_each(|(_, operand)| self.expr(operand, soft))
            }
            ExprKind::Compare(first, rest) => {
                self.expr(first, soft)?;
                rest.iter_mut().try_for_each(|(_, operand)| self.expr(operand, soft))
            }
            ExprKind::Cond { test, then, other } => {
                self.expr(test, true)?;
                self.expr(then, true)?;
                other.as_mut().map_or(Ok(()), |other| self.expr(other, true))
            }
            ExprKind::Postfix(base, ops) => {
                self.expr(base, soft)?;
                self.ops(ops, soft)
            }
        }
    }

    fn ops(&mut self, ops: &mut [Op], soft: bool) -> Res<()> {
        for op in ops {
            match &mut op.kind {
                OpKind::Attr(_) => {}
                OpKind::Item(item) => self.expr(item, soft)?,
                OpKind::Slice(parts) => parts.iter_mut().flatten().try_for_each(|part| self.expr(part, soft))?,
                OpKind::Call(args) => self.args(args, soft)?,
                OpKind::Filter(name, found, args) => {
                    if found.is_none() && !soft {
                        let name = &self.program.strings[*name as usize];
                        return Err(syntax(format!("no filter named `{name}`")).at(op.line));
                    }
                    self.args(args, soft)?;
                }
                OpKind::Test(name, found, args, _) => {
                    if found.is_none() && !soft {
                        let name = &self.program.strings[*name as usize];
                        return Err(syntax(format!("no test named `{name}`")).at(op.line));
                    }
                    self.args(args, soft)?;
                }
            }
        }
        Ok(())
    }

    fn args(&mut self, args: &mut Args, soft: bool) -> Res<()> {
        self.exprs(&mut args.positional, soft)?;
        args.named.iter_mut().try_for_each(|(_, value)| self.expr(value, soft))?;
        args.star.as_mut().map_or(Ok(()), |star| self.expr(star, soft))?;
        args.star_star.as_mut().map_or(Ok(()), |star| self.expr(star, soft))
    }
}
