//! The names that parts of a template read and assign, in the order of Jinja 2's nodes.

#![allow(clippy::needless_for_each, reason = "one line for each kind of node")]

use super::ast::{Expr, ExprKind, Op, OpKind, Program, Stmt, StmtKind, Sym, Target};

/// Calls `f` with every name that an expression reads, from the left.
pub(super) fn names_of(expr: &Expr, f: &mut dyn FnMut(Sym)) {
    match &expr.kind {
        ExprKind::None | ExprKind::Bool(_) | ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) => {}
        ExprKind::Name(name, _) => f(*name),
        ExprKind::List(items)
        | ExprKind::Tuple(items)
        | ExprKind::Concat(items)
        | ExprKind::And(items)
        | ExprKind::Or(items) => items.iter().for_each(|item| names_of(item, f)),
        ExprKind::Dict(entries) => entries.iter().for_each(|(key, value)| {
            names_of(key, f);
            names_of(value, f);
        }),
        ExprKind::Negative(operand) | ExprKind::Positive(operand) | ExprKind::Not(operand) => names_of(operand, f),
        ExprKind::Math(first, rest) => {
            names_of(first, f);
            rest.iter().for_each(|(_, operand)| names_of(operand, f));
        }
        ExprKind::Compare(first, rest) => {
            names_of(first, f);
            rest.iter().for_each(|(_, operand)| names_of(operand, f));
        }
        ExprKind::Cond { test, then, other } => {
            [Some(test), Some(then), other.as_ref()].into_iter().flatten().for_each(|part| names_of(part, f));
        }
        ExprKind::Postfix(base, ops) => {
            names_of(base, f);
            ops.iter().for_each(|op| names_of_op(op, f));
        }
    }
}

pub(super) fn names_of_op(op: &Op, f: &mut dyn FnMut(Sym)) {
    match &op.kind {
        OpKind::Attr(_) => {}
        OpKind::Item(item) => names_of(item, f),
        OpKind::Slice(parts) => parts.iter().flatten().for_each(|part| names_of(part, f)),
        OpKind::Call(args) | OpKind::Filter(_, _, args) | OpKind::Test(_, _, args, _) => {
            args.positional.iter().for_each(|arg| names_of(arg, f));
            args.named.iter().for_each(|(_, arg)| names_of(arg, f));
            [&args.star, &args.star_star].into_iter().flatten().for_each(|arg| names_of(arg, f));
        }
    }
}

fn names_of_target(target: &Target, f: &mut dyn FnMut(Sym, bool)) {
    match target {
        Target::Name(name, _) => f(*name, false),
        Target::Attr(..) => {}
        Target::Tuple(items) => items.iter().for_each(|item| names_of_target(item, f)),
    }
}

/// Calls `f` with every name in statements and whether it is read, in the order of Jinja 2's nodes, blocks left out.
pub(super) fn walk(program: &Program, body: &[Stmt], f: &mut dyn FnMut(Sym, bool)) {
    let walk_macro = |id: &u32, f: &mut dyn FnMut(Sym, bool)| {
        let part = &program.macros[*id as usize];
        part.params.iter().for_each(|(name, _)| f(*name, false));
        part.defaults.iter().for_each(|value| names_of(value, &mut |name| f(name, true)));
        walk(program, &part.function.body, f);
    };
    for stmt in body {
        match &stmt.kind {
            StmtKind::Print(values) => values.iter().for_each(|value| names_of(value, &mut |name| f(name, true))),
            StmtKind::Set(target, value, _) => {
                names_of_target(target, f);
                names_of(value, &mut |name| f(name, true));
            }
            StmtKind::SetBlock { target, ops, body, .. } => {
                names_of_target(target, f);
                ops.iter().for_each(|op| names_of_op(op, &mut |name| f(name, true)));
                walk(program, body, f);
            }
            StmtKind::If(branches, other) => {
                for (test, body) in branches {
                    names_of(test, &mut |name| f(name, true));
                    walk(program, body, f);
                }
                walk(program, other, f);
            }
            StmtKind::For(id) => {
                let part = &program.loops[*id as usize];
                names_of_target(&part.target, f);
                names_of(&part.iter, &mut |name| f(name, true));
                walk(program, &part.body, f);
                walk(program, &part.other, f);
                if let Some((_, test, _)) = &part.test {
                    names_of(test, &mut |name| f(name, true));
                }
            }
            StmtKind::With { targets, body, .. } => {
                targets.iter().for_each(|(target, _)| names_of_target(target, f));
                targets.iter().for_each(|(_, value)| names_of(value, &mut |name| f(name, true)));
                walk(program, body, f);
            }
            StmtKind::Autoescape { value, body, .. } => {
                names_of(value, &mut |name| f(name, true));
                walk(program, body, f);
            }
            StmtKind::FilterBlock { ops, body, .. } => {
                walk(program, body, f);
                ops.iter().for_each(|op| names_of_op(op, &mut |name| f(name, true)));
            }
            StmtKind::Macro(id, ..) | StmtKind::Generation(id) => walk_macro(id, f),
            StmtKind::Call(id, call) => {
                names_of(call, &mut |name| f(name, true));
                walk_macro(id, f);
            }
            StmtKind::Loader(value, _) => names_of(value, &mut |name| f(name, true)),
            StmtKind::Text(_) | StmtKind::Block(..) | StmtKind::Break | StmtKind::Continue => {}
        }
    }
}
