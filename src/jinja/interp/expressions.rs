//! Expressions: names, operators, and what follows a value (attributes, calls, filters, tests).

use std::rc::Rc;

use super::super::Origin;
use super::super::ast::{Expr, ExprKind, Op, OpKind, Sym, Var};
use super::super::dict::Dict;
use super::super::error::{Res, syntax};
use super::super::object::Env;
use super::super::string::Str;
use super::super::value::{Value, Why};
use super::super::{methods, ops};
use super::Vm;

impl Vm<'_> {
    pub(super) fn variable(&self, name: Sym, var: Var, env: &Env) -> Value {
        env.get(var).unwrap_or_else(|| Value::undefined_for(Why::Name(self.string(name).clone())))
    }

    pub(super) fn eval(&self, expr: &Expr, env: &Rc<Env>) -> Res<Value> {
        self.eval_with(expr, env, None)
    }

    fn eval_all(&self, exprs: &[Expr], env: &Rc<Env>) -> Res<Vec<Value>> {
        self.fits(exprs.len())?;
        exprs.iter().map(|expr| self.eval(expr, env)).collect()
    }

    /// `caller`: passed on by the last call of the expression.
    pub(super) fn eval_with(&self, expr: &Expr, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        self.step()?;
        Ok(match &expr.kind {
            ExprKind::None => Value::None,
            ExprKind::Bool(value) => Value::Bool(*value),
            ExprKind::Int(value) => Value::Int(*value),
            ExprKind::Float(value) => Value::Float(*value),
            ExprKind::Str(text) => Value::Str(self.string(*text).clone()),
            ExprKind::Name(name, var) => self.variable(*name, *var, env),
            _ => {
                let _deeper = self.deeper()?;
                return self.eval_nested(expr, env, caller).map_err(|error| error.at(expr.line));
            }
        })
    }

    fn eval_nested(&self, expr: &Expr, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        Ok(match &expr.kind {
            ExprKind::List(items) => Value::list(self.eval_all(items, env)?),
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items, env)?),
            ExprKind::Dict(entries) => {
                let mut dict = Dict::default();
                for (key, value) in entries {
                    let key = self.eval(key, env)?;
                    self.keying(&key)?;
                    dict.insert(key, self.eval(value, env)?)?;
                }
                Value::Dict(Rc::new(dict))
            }
            ExprKind::Negative(operand) => {
                ops::unary(&self.eval(operand, env)?, "unary -", i128::checked_neg, |number| -number)?
            }
            ExprKind::Positive(operand) => ops::unary(&self.eval(operand, env)?, "unary +", Some, |number| number)?,
            ExprKind::Not(operand) => Value::Bool(!self.eval(operand, env)?.is_true()),
            ExprKind::Math(first, rest) => {
                let mut value = self.eval(first, env)?;
                for (op, operand) in rest {
                    let operand = self.eval(operand, env)?;
                    value = ops::math(self, *op, &value, &operand)?;
                }
                value
            }
            ExprKind::Concat(parts) => {
                let values = self.eval_all(parts, env)?;
                let mut text = self.buf();
                values.iter().try_for_each(|value| self.write(value, &mut text))?;
                Value::Str(text.finish())
            }
            ExprKind::And(parts) => self.logic(parts, env, false)?,
            ExprKind::Or(parts) => self.logic(parts, env, true)?,
            ExprKind::Compare(first, rest) => {
                let mut left = self.eval(first, env)?;
                for (op, operand) in rest {
                    let right = self.eval(operand, env)?;
                    if !ops::compare(self, *op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            ExprKind::Cond { test, then, other } => {
                if self.eval(test, env)?.is_true() {
                    self.eval(then, env)?
                } else if let Some(other) = other {
                    self.eval(other, env)?
                } else {
                    Value::undefined("the inline if-expression evaluated to false and no else section was defined.")
                }
            }
            ExprKind::Postfix(base, ops) => {
                let value = self.eval(base, env)?;
                self.apply_all(value, ops, env, caller)?
            }
            _ => self.eval(expr, env)?,
        })
    }

    fn logic(&self, parts: &[Expr], env: &Rc<Env>, stop: bool) -> Res<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.eval(part, env)?;
            if value.is_true() == stop {
                break;
            }
        }
        Ok(value)
    }

    /// `caller`: passed on by the last of the operations.
    pub(super) fn apply_all(
        &self,
        mut value: Value,
        ops: &[Op],
        env: &Rc<Env>,
        mut caller: Option<Value>,
    ) -> Res<Value> {
        for (at, op) in ops.iter().enumerate() {
            let caller = if at + 1 == ops.len() { caller.take() } else { None };
            value = self.apply(value, op, env, caller).map_err(|error| error.at(op.line))?;
        }
        Ok(value)
    }

    fn apply(&self, value: Value, op: &Op, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        self.step()?;
        match &op.kind {
            OpKind::Attr(name) => methods::attribute(self, &value, self.string(*name)),
            OpKind::Item(item) => {
                let item = self.eval(item, env)?;
                methods::item(self, &value, &item)
            }
            OpKind::Slice(parts) => {
                let mut bounds = [Value::None, Value::None, Value::None];
                for (bound, part) in bounds.iter_mut().zip(&**parts) {
                    if let Some(part) = part {
                        *bound = self.eval(part, env)?;
                    }
                }
                ops::slice(self, &value, &bounds)
            }
            OpKind::Call(args) => {
                let mut args = self.args(args, env)?;
                if let Some(caller) = caller {
                    args.named.push((Str::plain("caller".into(), Origin::Template), caller));
                }
                self.call(&value, args)
            }
            OpKind::Filter(name, filter, args) => {
                let args = self.args(args, env)?;
                let Some(filter) = filter else {
                    return Err(syntax(format!("no filter named `{}`", self.string(*name).text())));
                };
                let _deeper = self.deeper()?;
                filter(self, value, args)
            }
            OpKind::Test(name, test, args, negated) => {
                let args = self.args(args, env)?;
                let Some(test) = test else {
                    return Err(syntax(format!("no test named `{}`", self.string(*name).text())));
                };
                Ok(Value::Bool(test(self, &value, args)? != *negated))
            }
        }
    }
}
