//! mbarriers, bulk copies, wgmma, clusters: what the machine does for a thread.

use super::*;
use crate::wgmma;

impl Decoder<'_> {
    pub(super) fn asynchronous(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        match s.opcode.as_str() {
            "mbarrier" => self.mbarrier(s, m),
            "wgmma" => self.wgmma(s, m),
            "cp" => self.bulk(s, m),
            "setmaxnreg" => {
                let increase = self.need(s, m.take_any(&["inc", "dec"]))? == "inc";
                self.needs(s, m, &["sync", "aligned", "u32"])?;
                let Operand::Integer(count) = *self.operand(s, 0)? else { return fail(s, "expected a number") };
                if count % 8 != 0 || !(24..=256).contains(&count) {
                    return fail(s, "setmaxnreg takes a multiple of 8 in 24..=256");
                }
                Ok(machine(s, MachineKind::SetMaxRegisters { increase, count: count as u32 }, vec![], vec![]))
            }
            "elect" => {
                self.needs(s, m, &["sync"])?;
                let (d, p) = match self.operand(s, 0)?.clone() {
                    Operand::Pair(d, p) => (self.register(s, &d)?.slot, self.register(s, &p)?.slot),
                    _ => return fail(s, "expected `d|p`"),
                };
                let mask = Some(self.a(s, 1, Type::B32)?);
                Ok(Op::Meet(Box::new(Meeting { name: "elect.sync".into(), mask, what: Collective::Elect { d, p } })))
            }
            // An address in the cluster is the block's rank plus one above 24 bits of its shared address; 0 there is the
            // thread's own block.
            "mapa" => {
                m.ignore(&["shared::cluster"]);
                let ty = self.ty(s, m)?;
                let f: arith::Binary = |a, rank| (a & !0xFF00_0000) | (rank + 1) << 24;
                Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: self.a(s, 2, Type::U32)? })
            }
            "getctarank" => {
                m.ignore(&["shared::cluster"]);
                let ty = self.ty(s, m)?;
                let own = SPECIAL.iter().position(|n| *n == "%cluster_ctarank").unwrap_or_default() as Slot;
                let f: arith::Binary = |a, own| match a >> 24 & 0xFF {
                    0 => own,
                    rank => rank - 1,
                };
                Ok(Op::Binary { f, d: self.d(s, 0)?, a: self.a(s, 1, ty)?, b: own })
            }
            "fence" => {
                if m.take("mbarrier_init") {
                    self.needs(s, m, &["release", "cluster"])?;
                    return Ok(machine(s, MachineKind::MbarrierInitFence, vec![], vec![]));
                }
                self.needs(s, m, &["proxy"])?;
                self.needs(s, m, &["async"])?;
                m.take_any(&["global", "shared::cta", "shared::cluster"]);
                Ok(machine(s, MachineKind::ProxyFence, vec![], vec![]))
            }
            _ => {
                self.needs(s, m, &["cluster"])?;
                let arrive = self.need(s, m.take_any(&["arrive", "wait"]))? == "arrive";
                let order = m.take_any(&["release", "relaxed", "acquire"]);
                m.ignore(&["aligned"]);
                let kind = match (arrive, order) {
                    (true, None | Some("release")) => MachineKind::ClusterArrive { release: true },
                    (true, Some("relaxed")) => MachineKind::ClusterArrive { release: false },
                    (false, None | Some("acquire")) => MachineKind::ClusterWait { acquire: true },
                    _ => return fail(s, "unsupported order of barrier.cluster"),
                };
                Ok(machine(s, kind, vec![], vec![]))
            }
        }
    }

    /// Modifiers that must stand there.
    fn needs(&self, s: &Statement, m: &mut Modifiers, names: &[&str]) -> Result<(), LoadError> {
        names.iter().try_for_each(|name| {
            if m.take(name) { Ok(()) } else { fail(s, format!("`{}` without `.{name}`", s.opcode)) }
        })
    }

    /// A value that is read, without an offset.
    fn read(&mut self, s: &Statement, i: usize, ty: Type) -> Result<(Slot, i32), LoadError> {
        Ok((self.a(s, i, ty)?, 0))
    }

    fn mbarrier(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let what = self.need(s, m.take_any(&["init", "inval", "arrive", "expect_tx", "test_wait", "try_wait"]))?;
        let bytes = what == "arrive" && m.take("expect_tx");
        let parity = m.take("parity");
        let order = m.take_any(&["release", "relaxed", "acquire"]);
        // Of two scopes written without a space, `cluster` can only be the scope: the space is `shared::cluster`.
        m.take_any(&["cta", "cluster"]);
        let remote = match m.take_any(&["shared::cta", "shared::cluster", "shared"]) {
            Some(space) => space == "shared::cluster",
            None => false, // a generic address
        };
        self.needs(s, m, &["b64"])?;
        let (kind, d, a) = match what {
            "init" => {
                let a = vec![self.address(s, 0)?, self.read(s, 1, Type::U32)?];
                (MachineKind::MbarrierInit, vec![], a)
            }
            "inval" => (MachineKind::MbarrierInvalidate, vec![], vec![self.address(s, 0)?]),
            "expect_tx" => {
                let a = vec![self.address(s, 0)?, self.read(s, 1, Type::U32)?];
                (MachineKind::ExpectBytes { remote }, vec![], a)
            }
            "arrive" => {
                if order == Some("acquire") {
                    return fail(s, "an arrival acquires nothing");
                }
                // The state is left out where another block's barrier is arrived at.
                let first = usize::from(!matches!(self.operand(s, 0)?, Operand::Address { .. }));
                let d = if first == 1 { vec![self.d(s, 0)?] } else { vec![] };
                let mut a = vec![self.address(s, first)?];
                let more = s.operands.len() > first + 1;
                if more {
                    a.push(self.read(s, first + 1, Type::U32)?);
                }
                if bytes && !more {
                    return fail(s, "expect_tx without bytes");
                }
                let release = order != Some("relaxed");
                (MachineKind::Arrive { count: more && !bytes, bytes, release, remote }, d, a)
            }
            _ => {
                if order == Some("release") || remote {
                    return fail(s, "a wait acquires, on its own block's mbarrier");
                }
                let ty = if parity { Type::U32 } else { Type::B64 };
                let a = vec![self.address(s, 1)?, self.read(s, 2, ty)?];
                let kind = MachineKind::Wait { parity, suspend: what == "try_wait", acquire: order != Some("relaxed") };
                (kind, vec![self.d(s, 0)?], a)
            }
        };
        Ok(machine(s, kind, d, a))
    }

    fn bulk(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        self.needs(s, m, &["async", "bulk"])?;
        if m.take("commit_group") {
            return Ok(machine(s, MachineKind::BulkCommit, vec![], vec![]));
        }
        if m.take("wait_group") {
            let read = m.take("read");
            let Operand::Integer(n) = *self.operand(s, 0)? else { return fail(s, "expected a number") };
            return Ok(machine(s, MachineKind::BulkWait { pending: n as u32, read }, vec![], vec![]));
        }
        if m.take("prefetch") {
            m.left.clear();
            return Ok(Op::Nothing);
        }
        let tensor = m.take("tensor");
        let rank = m.take_any(&["1d", "2d", "3d", "4d", "5d"]).map_or(0, |r| r.as_bytes()[0] - b'0');
        if tensor != (rank > 0) {
            return fail(s, "a tensor copy without its rank");
        }
        m.ignore(&["tile"]);
        let first = m.left.iter().position(|w| matches!(*w, "global" | "shared::cta" | "shared::cluster"));
        let to = first.map(|i| m.left.remove(i));
        let second = m.left.iter().position(|w| matches!(*w, "global" | "shared::cta"));
        let from = second.map(|i| m.left.remove(i));
        let multicast = m.take("multicast::cluster");
        m.take("L2::cache_hint");
        let counted = m.take("mbarrier::complete_tx::bytes");
        let grouped = m.take("bulk_group");
        let tensor_operand = |d: &mut Self, i: usize| -> Result<_, LoadError> {
            let Operand::Tensor { base, coordinates } = d.operand(s, i)?.clone() else {
                return fail(s, "expected a tensor map and coordinates");
            };
            if coordinates.len() != usize::from(rank) {
                return fail(s, "coordinates of another rank");
            }
            let coordinates = coordinates
                .iter()
                .map(|o| Ok((d.value(s, o, Type::S32)?, 0)))
                .collect::<Result<Vec<_>, LoadError>>()?;
            Ok(((d.value(s, &base, Type::B64)?, 0), coordinates))
        };
        let (kind, a) = match (to, from) {
            (Some("shared::cluster" | "shared::cta"), Some("global")) if counted && !grouped => {
                let destination = self.address(s, 0)?;
                let (mut a, at, kind) = if tensor {
                    let (map, coordinates) = tensor_operand(self, 1)?;
                    let mut a = vec![destination, map, self.address(s, 2)?];
                    a.extend(coordinates);
                    (a, 3, MachineKind::TensorLoad { rank, multicast })
                } else {
                    let a = vec![destination, self.address(s, 1)?, self.read(s, 2, Type::U32)?, self.address(s, 3)?];
                    (a, 4, MachineKind::BulkLoad { multicast })
                };
                if multicast {
                    a.push(self.read(s, at, Type::B16)?);
                }
                (kind, a)
            }
            (Some("shared::cluster"), Some("shared::cta")) if counted && !grouped && !tensor && !multicast => {
                let a =
                    vec![self.address(s, 0)?, self.address(s, 1)?, self.read(s, 2, Type::U32)?, self.address(s, 3)?];
                (MachineKind::BulkToPeer, a)
            }
            (Some("global"), Some("shared::cta")) if grouped && !counted && !multicast => {
                if tensor {
                    let (map, coordinates) = tensor_operand(self, 0)?;
                    let mut a = vec![map, self.address(s, 1)?];
                    a.extend(coordinates);
                    (MachineKind::TensorStore { rank }, a)
                } else {
                    let a = vec![self.address(s, 0)?, self.address(s, 1)?, self.read(s, 2, Type::U32)?];
                    (MachineKind::BulkStore, a)
                }
            }
            _ => return fail(s, "unsupported form of cp.async.bulk"),
        };
        Ok(machine(s, kind, vec![], a))
    }

    fn wgmma(&mut self, s: &Statement, m: &mut Modifiers) -> Result<Op, LoadError> {
        let what = self.need(s, m.take_any(&["fence", "commit_group", "wait_group", "mma_async"]))?;
        self.needs(s, m, &["sync", "aligned"])?;
        match what {
            "fence" => return Ok(machine(s, MachineKind::WgmmaFence, vec![], vec![])),
            "commit_group" => return Ok(machine(s, MachineKind::WgmmaCommit, vec![], vec![])),
            "wait_group" => {
                let Operand::Integer(n) = *self.operand(s, 0)? else { return fail(s, "expected a number") };
                return Ok(machine(s, MachineKind::WgmmaWait { pending: n as u32 }, vec![], vec![]));
            }
            _ => {}
        }
        let size = m.left.iter().position(|w| w.starts_with("m64n")).map(|i| m.left.remove(i));
        let types = [self.ty(s, m)?, self.ty(s, m)?, self.ty(s, m)?];
        let d = match self.operand(s, 0)?.clone() {
            Operand::List(l) => l.iter().map(|o| self.register(s, o).map(|r| r.slot)).collect::<Result<Vec<_>, _>>()?,
            _ => return fail(s, "expected a vector"),
        };
        let from_registers = matches!(self.operand(s, 1)?, Operand::List(_));
        let mut a: Vec<(Slot, i32)> = if from_registers {
            self.vector(s, 1, Type::B32)?.into_iter().map(|slot| (slot, 0)).collect()
        } else {
            vec![self.read(s, 1, Type::B64)?]
        };
        a.push(self.read(s, 2, Type::B64)?);
        let (adds, negated) = self.predicate(s, 3)?;
        if negated {
            return fail(s, "a negated scale-d");
        }
        // A literal is a constant: the slot that always holds 1 says so to whoever asks.
        let adds = if matches!(self.operand(s, 3)?, Operand::Integer(v) if *v != 0) { TRUE } else { adds };
        a.push((adds, 0));
        let immediate = |d: &Self, i: usize| match d.operand(s, i)? {
            Operand::Integer(v) => Ok(*v as i64),
            _ => fail(s, "expected a number"),
        };
        let sign = |v: i64| match v {
            1 => Ok(false),
            -1 => Ok(true),
            _ => fail(s, "a scale that is neither 1 nor -1"),
        };
        let negate = [sign(immediate(self, 4)?)?, sign(immediate(self, 5)?)?];
        let transposed = |v: i64| match v {
            0 => Ok(false),
            1 => Ok(true),
            _ => fail(s, "a transposition that is neither 0 nor 1"),
        };
        let (across_a, b) = if from_registers { (false, 6) } else { (transposed(immediate(self, 6)?)?, 7) };
        let across_b = transposed(immediate(self, b)?)?;
        if s.operands.len() != b + 1 {
            return fail(s, "too many operands");
        }
        let shape = wgmma::Shape::find(size.unwrap_or_default(), types, from_registers, negate, [across_a, across_b]);
        let shape = self.need(s, shape)?;
        if d.len() != shape.columns() / 2 || a.len() != if from_registers { 6 } else { 3 } {
            return fail(s, "fragments of another size");
        }
        Ok(machine(s, MachineKind::Wgmma(shape), d, a))
    }

    /// A load or store of another block's shared memory.
    pub(super) fn remote_access(&mut self, s: &Statement, m: &mut Modifiers, load: bool) -> Result<Op, LoadError> {
        // With the space taken away, `access` would read the address as generic.
        let (access, _) = self.access(s, m, load)?;
        let access = Access { space: Space::Shared, ..access };
        let regs = &access.regs[..usize::from(access.count)];
        let address = (access.base, access.offset);
        Ok(if load {
            machine(s, MachineKind::RemoteLoad(access), regs.to_vec(), vec![address])
        } else {
            let a = [address].into_iter().chain(regs.iter().map(|&slot| (slot, 0))).collect();
            machine(s, MachineKind::RemoteStore(access), vec![], a)
        })
    }
}

fn machine(s: &Statement, kind: MachineKind, d: Vec<Slot>, a: Vec<(Slot, i32)>) -> Op {
    let name = format!("{}.{}", s.opcode, s.modifiers.join("."));
    Op::Machine(Box::new(MachineOp { name, kind, d, a }))
}
