//! What a template is after parsing. Chains of operators are flat, so that their length costs no stack.

use std::sync::Arc;

use super::filters::Filter;
use super::tests::Test;

/// A string of the template, by its place in [`Program::strings`].
pub(super) type Sym = u32;

/// A whole template. Macros, loops and blocks lie in tables, so that values can refer to them by number.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub strings: Vec<Arc<str>>,
    pub macros: Vec<Macro>,
    pub loops: Vec<For>,
    pub blocks: Vec<Block>,
    pub root: Function,
}

impl Program {
    /// A new string of the program.
    pub fn symbol(&mut self, text: &str) -> Sym {
        self.strings.push(text.into());
        Sym::try_from(self.strings.len() - 1).unwrap_or(Sym::MAX)
    }
}

/// What Jinja 2 compiles to a Python function: variables live as long as one call of it.
#[derive(Debug, Default)]
pub(super) struct Function {
    pub frame: Frame,
    pub body: Vec<Stmt>,
    pub num_slots: u32,
    /// Where `self` lies, if it is used; the same for `super` in a block.
    pub self_slot: Option<u32>,
    pub super_slot: Option<u32>,
}

/// A variable: how many functions outwards, and its slot there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Var {
    pub hops: u32,
    pub slot: u32,
}

/// The variables of one scope, and what they hold when it is entered.
#[derive(Debug, Default)]
pub(super) struct Frame {
    pub loads: Vec<(u32, Load)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    Parameter,
    Undefined,
    Alias(Var),
    Resolve(Sym),
}

#[derive(Debug, Default)]
pub(super) struct Expr {
    pub line: u32,
    pub kind: ExprKind,
}

#[derive(Debug, Default)]
pub(super) enum ExprKind {
    #[default]
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Sym),
    Name(Sym, Var),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Not(Box<Expr>),
    /// Operators of one precedence, from the left.
    Math(Box<Expr>, Vec<(Math, Expr)>),
    Concat(Vec<Expr>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Compare, Expr)>),
    Cond {
        test: Box<Expr>,
        then: Box<Expr>,
        other: Option<Box<Expr>>,
    },
    Postfix(Box<Expr>, Vec<Op>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Math {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

/// What follows an expression: `.a`, `[b]`, `(c)`, `|d`, `is e`.
#[derive(Debug)]
pub(super) struct Op {
    pub line: u32,
    pub kind: OpKind,
}

#[derive(Debug)]
pub(super) enum OpKind {
    Attr(Sym),
    Item(Expr),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Args),
    /// `None`: Jinja 2 has no such filter, which matters only if it is called.
    Filter(Sym, Option<Filter>, Args),
    Test(Sym, Option<Test>, Args, bool),
}

#[derive(Debug, Default)]
pub(super) struct Args {
    pub positional: Vec<Expr>,
    pub named: Vec<(Sym, Expr)>,
    pub star: Option<Box<Expr>>,
    pub star_star: Option<Box<Expr>>,
}

#[derive(Debug, Clone)]
pub(super) enum Target {
    Name(Sym, Var),
    /// `namespace.attribute`
    Attr(Sym, Var, Sym),
    Tuple(Vec<Target>),
}

impl Default for Target {
    fn default() -> Self {
        Self::Tuple(Vec::new())
    }
}

#[derive(Debug)]
pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

#[derive(Debug)]
pub(super) enum StmtKind {
    Text(Sym),
    Print(Vec<Expr>),
    /// `bool`: at the top level, so that blocks see it.
    Set(Target, Expr, bool),
    SetBlock {
        frame: Frame,
        target: Target,
        ops: Vec<Op>,
        body: Vec<Stmt>,
        top: bool,
    },
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(u32),
    With {
        frame: Frame,
        targets: Vec<(Target, Expr)>,
        body: Vec<Stmt>,
    },
    Autoescape {
        frame: Frame,
        value: Expr,
        body: Vec<Stmt>,
    },
    FilterBlock {
        frame: Frame,
        ops: Vec<Op>,
        body: Vec<Stmt>,
    },
    Macro(u32, Var, bool),
    /// The macro is what the callee sees as `caller`.
    Call(u32, Expr),
    /// `{% generation %}`: what is inside is a macro that is called at once.
    Generation(u32),
    /// The variables that a `scoped` block sees.
    Block(u32, Option<Vec<(Sym, Var)>>),
    Break,
    Continue,
    /// `include`, `import`, `from`, `extends`: there is no loader.
    Loader(Expr, Vec<(Sym, Var)>),
}

#[derive(Debug, Default)]
pub(super) struct For {
    pub line: u32,
    pub target: Target,
    pub iter: Expr,
    pub body: Vec<Stmt>,
    pub other: Vec<Stmt>,
    pub recursive: bool,
    /// The body may use `loop`.
    pub extended: bool,
    pub frame: Frame,
    pub other_frame: Frame,
    pub loop_slot: Option<u32>,
    /// The condition has variables of its own.
    pub test: Option<(Target, Expr, Frame)>,
    /// Of a recursive loop, which is a function.
    pub num_slots: u32,
}

#[derive(Debug, Default)]
pub(super) struct Macro {
    /// `None`: the body of a call block.
    pub name: Option<Sym>,
    pub params: Vec<(Sym, u32)>,
    /// Of the last parameters.
    pub defaults: Vec<Expr>,
    pub function: Function,
    pub caller: Option<u32>,
    pub kwargs: Option<u32>,
    pub varargs: Option<u32>,
    pub explicit_caller: bool,
    pub accesses_caller: bool,
}

#[derive(Debug, Default)]
pub(super) struct Block {
    pub name: Sym,
    pub function: Function,
    pub scoped: bool,
    pub required: bool,
}
