//! What a scope reads and assigns, and so which variables are its own.

use std::collections::HashSet;
use std::mem;

use super::super::ast::{Expr, Load, Op, Stmt, StmtKind, Sym, Target};
use super::super::error::Res;
use super::super::names::{names_of, names_of_op, walk};
use super::Resolver;

impl Resolver<'_> {
    pub(super) fn declare(&mut self, name: Sym) -> u32 {
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

    pub(super) fn analyze(&mut self, body: &[Stmt]) -> Res<()> {
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

    pub(super) fn analyze_target(&mut self, target: &Target, parameter: bool) {
        match target {
            Target::Name(name, _) if parameter => {
                self.declare(*name);
            }
            Target::Name(name, _) => self.store(*name),
            Target::Attr(name, ..) => self.load(*name),
            Target::Tuple(items) => items.iter().for_each(|item| self.analyze_target(item, parameter)),
        }
    }

    pub(super) fn analyze_exprs(&mut self, exprs: &[Expr]) -> Res<()> {
        exprs.iter().try_for_each(|expr| self.analyze_expr(expr))
    }

    pub(super) fn analyze_expr(&mut self, expr: &Expr) -> Res<()> {
        let mut names = Vec::new();
        names_of(expr, &mut |name| names.push(name));
        for name in names {
            self.visit()?;
            self.load(name);
        }
        Ok(())
    }

    pub(super) fn analyze_ops(&mut self, ops: &[Op]) -> Res<()> {
        let mut names = Vec::new();
        for op in ops {
            names_of_op(op, &mut |name| names.push(name));
        }
        for name in names {
            self.load(name);
        }
        self.visit()
    }

    /// Which of `names` the statements read before they assign them.
    pub(super) fn undeclared(&mut self, body: &[Stmt], names: &[Sym]) -> Res<HashSet<Sym>> {
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
}
