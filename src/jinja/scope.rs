//! Which variable a name is: decided before rendering, by the rules of Jinja 2's compiler.
//!
//! A name that a scope assigns is that scope's from its beginning on, unless the assignment is conditional. A name that
//! no scope assigns is looked up in the context, when the outermost scope that reads it is entered.

mod analysis;
mod variables;

use std::collections::{HashMap, HashSet};
use std::mem;

use super::ast::{Frame, Function, Load, Program, Sym, Var};
use super::error::{Res, limit};

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

    fn visit(&mut self) -> Res<()> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(limit("the template has too many scopes within scopes"));
        }
        Ok(())
    }
}
