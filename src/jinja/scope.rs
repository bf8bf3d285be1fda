//! Which variable a name is: decided before rendering, by the rules of Jinja 2's compiler.
//!
//! A name that a scope assigns is that scope's from its beginning on, unless the assignment is conditional. A name that
//! no scope assigns is looked up in the context, when the outermost scope that reads it is entered.

#![allow(clippy::needless_for_each, reason = "one line for each kind of node")]

use std::collections::{HashMap, HashSet};
use std::mem;

use super::ast::{
    Args, Expr, ExprKind, For, Frame, Function, Load, Macro, Op, OpKind, Program, Stmt, StmtKind, Sym, Target, Var,
};
use super::error::{Res, limit, syntax};
use super::names::{names_of, names_of_op, walk};

/// How many names may be looked at: scopes in scopes are read again and again.
const MAX_VISITS: usize = 20_000_000;

/// A variable by the number of its function, counted from the outermost, and its slot there.
type Place = (u32, u32);

#[derive(Default)]
struct Scope {
    function: u32,
    refs: HashMap<Sym, Place>,
    /// Where a slot's load is in `loads`.
    load_of: HashMap<u32, usize>,
    loads: Vec<(u32, Load)>,
    stores: HashSet<Sym>,
    /// The same, in order.
    stored: Vec<Sym>,
}

/// Where a statement stands.
#[derive(Clone, Copy)]
struct Site {
    /// At the top level: what is assigned is seen by blocks.
    top: bool,
    /// In a condition, where an unknown filter matters only if it is called.
    soft: bool,
}

struct Resolver<'p> {
    program: &'p mut Program,
    scopes: Vec<Scope>,
    /// The number of slots of each open function.
    slots: Vec<u32>,
    special: HashMap<&'static str, Sym>,
    in_loop: usize,
    visits: usize,
}

/// Resolves all names of a template.
///
/// # Errors
/// For unknown filters and tests, and assignments to `loop` in a loop.
pub(super) fn resolve(program: &mut Program) -> Res<()> {
    let special = ["loop", "self", "super", "caller", "kwargs", "varargs"].map(|name| {
        let found = program.strings.iter().position(|text| &**text == name);
        let symbol = found.and_then(|at| Sym::try_from(at).ok()).unwrap_or_else(|| program.symbol(name));
        (name, symbol)
    });
    let mut resolver =
        Resolver { program, scopes: Vec::new(), slots: Vec::new(), special: special.into(), in_loop: 0, visits: 0 };
    let mut root = mem::take(&mut resolver.program.root);
    resolver.function(&mut root, Site { top: true, soft: false })?;
    resolver.program.root = root;
    for id in 0..resolver.program.blocks.len() {
        let mut function = mem::take(&mut resolver.program.blocks[id].function);
        resolver.function(&mut function, Site { top: false, soft: false })?;
        resolver.program.blocks[id].function = function;
    }
    Ok(())
}

impl Resolver<'_> {
    /// The template itself, or a block: nothing is outside.
    fn function(&mut self, function: &mut Function, site: Site) -> Res<()> {
        self.open_function();
        self.open();
        let [own, parent] = ["self", "super"].map(|name| self.special[name]);
        let unbound = self.undeclared(&function.body, &[own, parent])?;
        let is_block = !site.top;
        function.self_slot = unbound.contains(&own).then(|| self.declare(own));
        function.super_slot = (is_block && unbound.contains(&parent)).then(|| self.declare(parent));
        self.analyze(&function.body)?;
        self.body(&mut function.body, site)?;
        function.frame = self.close();
        function.num_slots = self.slots.pop().unwrap_or(0);
        Ok(())
    }

    fn open_function(&mut self) {
        self.slots.push(0);
    }

    fn open(&mut self) {
        let function = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.scopes.push(Scope { function, ..Scope::default() });
    }

    fn close(&mut self) -> Frame {
        Frame { loads: self.scopes.pop().unwrap_or_default().loads }
    }

    fn scope(&mut self) -> &mut Scope {
        if self.scopes.is_empty() {
            self.open();
        }
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    fn define(&mut self, name: Sym, load: Load) -> u32 {
        let place = self.scope().refs.get(&name).copied();
        let slot = place.map_or_else(
            || {
                let next = self.slots.last_mut().map_or(0, |count| {
                    *count += 1;
                    *count - 1
                });
                let scope = self.scope();
                let function = scope.function;
                scope.refs.insert(name, (function, next));
                next
            },
            |(_, slot)| slot,
        );
        self.set_load(slot, load);
        slot
    }

    fn set_load(&mut self, slot: u32, load: Load) {
        let scope = self.scope();
        let at = *scope.load_of.entry(slot).or_insert(scope.loads.len());
        if at == scope.loads.len() {
            scope.loads.push((slot, load));
        } else {
            scope.loads[at].1 = load;
        }
    }

    fn find(&mut self, name: Sym, outside: bool) -> Option<Place> {
        let end = self.scopes.len() - usize::from(outside);
        self.visits += end / 8 + 1;
        self.scopes[..end].iter().rev().find_map(|scope| scope.refs.get(&name).copied())
    }

    fn var(&mut self, name: Sym) -> Var {
        let here = self.scope().function;
        // Every name has been analysed before.
        let (function, slot) = self.find(name, false).unwrap_or((here, 0));
        Var { hops: here - function, slot }
    }

    fn outer_var(&mut self, name: Sym) -> Option<Var> {
        let here = self.scope().function;
        self.find(name, true).map(|(function, slot)| Var { hops: here - function, slot })
    }

    // What a scope reads and assigns.

    fn declare(&mut self, name: Sym) -> u32 {
        self.note_store(name);
        self.define(name, Load::Parameter)
    }

    fn note_store(&mut self, name: Sym) {
        let scope = self.scope();
        if scope.stores.insert(name) {
            scope.stored.push(name);
        }
    }

    fn store(&mut self, name: Sym) {
        self.note_store(name);
        if !self.scope().refs.contains_key(&name) {
            let load = self.outer_var(name).map_or(Load::Undefined, Load::Alias);
            self.define(name, load);
        }
    }

    fn load(&mut self, name: Sym) {
        if self.find(name, false).is_none() {
            self.define(name, Load::Resolve(name));
        }
    }

    fn analyze(&mut self, body: &[Stmt]) -> Res<()> {
        for stmt in body {
            self.visit()?;
            match &stmt.kind {
                StmtKind::Print(values) => self.analyze_exprs(values)?,
                StmtKind::Set(target, value, _) => {
                    self.analyze_expr(value)?;
                    self.analyze_target(target, false);
                }
                StmtKind::SetBlock { target, .. } => self.analyze_target(target, false),
                StmtKind::If(branches, other) => {
                    if let Some((test, _)) = branches.first() {
                        self.analyze_expr(test)?;
                    }
                    let before = self.scope().stored.len();
                    for (idx, (test, body)) in branches.iter().enumerate() {
                        if idx > 0 {
                            self.analyze_expr(test)?;
                        }
                        self.analyze(body)?;
                    }
                    self.analyze(other)?;
                    // What only a branch assigns is what it was outside, in the other case.
                    for at in before..self.scope().stored.len() {
                        let name = self.scope().stored[at];
                        let load = self.outer_var(name).map_or(Load::Resolve(name), Load::Alias);
                        self.define(name, load);
                    }
                }
                StmtKind::For(id) => {
                    let iter = mem::take(&mut self.program.loops[*id as usize].iter);
                    let done = self.analyze_expr(&iter);
                    self.program.loops[*id as usize].iter = iter;
                    done?;
                }
                StmtKind::With { targets, .. } => {
                    for (_, value) in targets {
                        self.analyze_expr(value)?;
                    }
                }
                StmtKind::FilterBlock { ops, .. } => self.analyze_ops(ops)?,
                StmtKind::Macro(id, ..) => {
                    if let Some(name) = self.program.macros[*id as usize].name {
                        self.store(name);
                    }
                }
                StmtKind::Call(_, call) => self.analyze_expr(call)?,
                StmtKind::Loader(value, names) => {
                    self.analyze_expr(value)?;
                    for (name, _) in names {
                        self.store(*name);
                    }
                }
                StmtKind::Text(_)
                | StmtKind::Autoescape { .. }
                | StmtKind::Generation(_)
                | StmtKind::Block(..)
                | StmtKind::Break
                | StmtKind::Continue => {}
            }
        }
        Ok(())
    }

    fn analyze_target(&mut self, target: &Target, parameter: bool) {
        match target {
            Target::Name(name, _) if parameter => {
                self.declare(*name);
            }
            Target::Name(name, _) => self.store(*name),
            Target::Attr(name, ..) => self.load(*name),
            Target::Tuple(items) => items.iter().for_each(|item| self.analyze_target(item, parameter)),
        }
    }

    fn analyze_exprs(&mut self, exprs: &[Expr]) -> Res<()> {
        exprs.iter().try_for_each(|expr| self.analyze_expr(expr))
    }

    fn analyze_expr(&mut self, expr: &Expr) -> Res<()> {
        let mut names = Vec::new();
        names_of(expr, &mut |name| names.push(name));
        for name in names {
            self.visit()?;
            self.load(name);
        }
        Ok(())
    }

    fn analyze_ops(&mut self, ops: &[Op]) -> Res<()> {
        let mut names = Vec::new();
        ops.iter().for_each(|op| names_of_op(op, &mut |name| names.push(name)));
        names.into_iter().for_each(|name| self.load(name));
        self.visit()
    }

    fn visit(&mut self) -> Res<()> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(limit("the template has too many scopes within scopes"));
        }
        Ok(())
    }

    /// Which of `names` the statements read before they assign them.
    fn undeclared(&mut self, body: &[Stmt], names: &[Sym]) -> Res<HashSet<Sym>> {
        let (mut open, mut found): (HashSet<Sym>, HashSet<Sym>) = (names.iter().copied().collect(), HashSet::new());
        let mut visits = 0;
        walk(self.program, body, &mut |name, is_load| {
            visits += 1;
            if open.contains(&name) {
                if is_load {
                    found.insert(name);
                } else {
                    open.remove(&name);
                }
            }
        });
        self.visits += visits / 4;
        self.visit()?;
        Ok(found)
    }

    // Names to variables.

    fn body(&mut self, body: &mut [Stmt], site: Site) -> Res<()> {
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
                targets.iter().for_each(|(target, _)| self.analyze_target(target, true));
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
                let mut part = mem::take(&mut self.program.macros[*id as usize]);
                self.macro_body(&mut part)?;
                if let Some(name) = part.name {
                    *var = self.var(name);
                }
                self.program.macros[*id as usize] = part;
            }
            StmtKind::Call(id, call) => {
                let mut part = mem::take(&mut self.program.macros[*id as usize]);
                self.macro_body(&mut part)?;
                self.program.macros[*id as usize] = part;
                self.expr(call, site.soft)?;
            }
            StmtKind::Generation(id) => {
                let mut part = mem::take(&mut self.program.macros[*id as usize]);
                self.macro_body(&mut part)?;
                self.program.macros[*id as usize] = part;
            }
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

    fn macro_body(&mut self, part: &mut Macro) -> Res<()> {
        let [caller, kwargs, varargs] = ["caller", "kwargs", "varargs"].map(|name| self.special[name]);
        let unbound = self.undeclared(&part.function.body, &[caller, kwargs, varargs])?;
        let has = |name: Sym, part: &Macro| part.params.iter().any(|(param, _)| *param == name);
        self.open_function();
        self.open();
        for at in 0..part.params.len() {
            part.params[at].1 = self.declare(part.params[at].0);
        }
        if unbound.contains(&caller) {
            if has(caller, part) {
                let required = part.params.len() - part.defaults.len();
                if part.params[..required].iter().any(|(param, _)| *param == caller) {
                    return Err(syntax("the special `caller` argument must be omitted or be given a default"));
                }
            } else {
                part.caller = Some(self.declare(caller));
            }
            part.accesses_caller = true;
        }
        if unbound.contains(&kwargs) && !has(kwargs, part) {
            part.kwargs = Some(self.declare(kwargs));
        }
        if unbound.contains(&varargs) && !has(varargs, part) {
            part.varargs = Some(self.declare(varargs));
        }
        part.explicit_caller = has(caller, part);
        self.analyze_exprs(&part.defaults)?;
        self.analyze(&part.function.body)?;
        part.defaults.iter_mut().try_for_each(|value| self.expr(value, false))?;
        self.body(&mut part.function.body, Site { top: false, soft: false })?;
        part.function.frame = self.close();
        part.function.num_slots = self.slots.pop().unwrap_or(0);
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
