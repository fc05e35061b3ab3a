//! Forms that nvcc emits too rarely to be met in the other tests, written by hand.

mod common;
use common::*;
use ptx_emulator::{Device, Fault, Grid, Options, Rule};

/// Runs a body on one warp (or more) that leaves its answer of each thread in %r0.
fn run_on(threads: u32, body: &str) -> Result<Vec<u32>, Fault> {
    let text = format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n\
         .const .align 4 .b32 numbers[3] = {{11, 22, 33}};\n\
         .global .align 4 .b32 variable = 7;\n\
         .visible .entry k(.param .u64 k_param_0, .param .align 8 .b8 k_param_1[16])\n{{\n\
         .reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<20>;\n.reg .f32 %f<9>;\n.reg .b64 %d<9>;\n.reg .f64 %g<9>;\n\
         .local .align 8 .b8 place[32];\n.shared .align 8 .b8 tile[64];\n\
         mov.u32 %r19, %tid.x;\n{body}\n\
         ld.param.u64 %d8, [k_param_0];\ncvta.to.global.u64 %d8, %d8;\nmad.wide.u32 %d8, %r19, 4, %d8;\n\
         st.global.u32 [%d8], %r0;\nret;\n}}\n"
    );
    let module = module(&text);
    let mut d = Device::new(Options::default());
    let out = d.alloc(4 * threads as usize);
    let structure: Vec<u8> = (1..=16).collect();
    let arguments = [out.into(), ptx_emulator::Argument::bytes(&structure)];
    d.launch(&module, "k", Grid::linear(1, threads, 0), &arguments)?;
    d.download(out, threads as usize)
}

fn run(body: &str) -> u32 {
    run_on(1, body).unwrap_or_else(|e| panic!("{body}\n{e}"))[0]
}

#[test]
fn scalar_forms() {
    for (body, want) in [
        // Carries: 64-bit sums of 32-bit halves, both ways.
        ("add.cc.u32 %r1, 0xFFFFFFFF, 1; addc.u32 %r0, 5, 6;", 12),
        ("sub.cc.u32 %r1, 0, 1; subc.u32 %r0, 5, 2;", 2),
        ("sub.cc.u32 %r1, 1, 1; subc.u32 %r0, 5, 2;", 3),
        // Two answers of one comparison.
        ("setp.lt.s32 %p1|%p2, -1, 1; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; add.u32 %r0, %r1, %r2;", 1),
        ("setp.eq.u32 %p3, 1, 2; setp.lt.and.u32 %p1, 1, 2, !%p3; selp.u32 %r0, 1, 0, %p1;", 1),
        ("setp.eq.u32 %p3, 1, 1; setp.gt.or.u32 %p1|%p2, 1, 2, %p3; selp.u32 %r0, 1, 0, %p2;", 1),
        ("set.lt.u32.f32 %r0, 0f3F800000, 0f40000000;", u32::MAX),
        ("{.reg.b16 a, b; mov.b16 a, 0x3C00; set.eq.f16.f16 b, a, a; cvt.u32.u16 %r0, b;}", 0x3C00),
        ("{.reg.b16 a, b; mov.b16 a, 0x3C00; set.gt.bf16.bf16 b, a, a; cvt.u32.u16 %r0, b;}", 0),
        ("{.reg.b16 a, b; mov.b16 a, 0x3C00; set.geu.bf16.bf16 b, a, a; cvt.u32.u16 %r0, b;}", 0x3F80),
        ("slct.s32.s32 %r0, 4, 5, -1;", 5),
        // Conversions and their extensions.
        ("cvt.s32.s8 %r0, 0x1FF;", u32::MAX),
        ("mov.u32 %r1, 0x1FF; cvt.u32.u8 %r0, %r1;", 0xFF),
        ("mov.u32 %r1, 0xFFFF8000; cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r0, %h1;", 0xFFFF_8000),
        ("mov.u32 %r1, -2; cvt.s64.s32 %d1, %r1; shr.u64 %d2, %d1, 32; cvt.u32.u64 %r0, %d2;", u32::MAX),
        ("mov.f32 %f1, 0fBFC00000; cvt.rzi.s32.f32 %r0, %f1;", -1i32 as u32),
        ("mov.f32 %f1, 0f40200000; cvt.rni.f32.f32 %f2, %f1; mov.b32 %r0, %f2;", 2f32.to_bits()),
        ("mov.f32 %f1, 0f40200000; cvt.sat.f32.f32 %f2, %f1; mov.b32 %r0, %f2;", 1f32.to_bits()),
        ("mov.f32 %f1, 0f7FC00000; cvt.sat.f32.f32 %f2, %f1; mov.b32 %r0, %f2;", 0),
        ("cvt.rn.bf16x2.f32 %r0, 0f3F800000, 0f40000000;", 0x3F80_4000),
        ("mov.f64 %g1, 0d3FF0000000000001; cvt.rp.f32.f64 %f1, %g1; mov.b32 %r0, %f1;", 0x3F80_0001),
        // Vectors of parts.
        ("mov.b32 {%h1, %h2}, 0x12345678; mov.b32 %r0, {%h2, %h1};", 0x5678_1234),
        ("mov.u64 %d1, 0x1122334455667788; mov.b64 {%r1, %r0}, %d1;", 0x1122_3344),
        ("mov.u64 %d1, 0x1122334455667788; mov.b64 {_, %r0}, %d1;", 0x1122_3344),
        // Memories.
        ("ld.param.v2.u32 {%r1, %r0}, [k_param_1+8];", 0x100F_0E0D),
        ("ld.param.u8 %r0, [k_param_1+3];", 4),
        ("ld.const.u32 %r0, [numbers+4];", 22),
        ("ld.global.u32 %r0, [variable];", 7),
        ("mov.u64 %d1, place; st.local.u32 [%d1+4], 99; cvta.local.u64 %d2, %d1; ld.u32 %r0, [%d2+4];", 99),
        ("st.local.u8 [place], 0x80; ld.local.s8 %r0, [place];", 0xFFFF_FF80),
        ("mov.u64 %d1, tile; cvta.shared.u64 %d2, %d1; st.u32 [%d2+8], 5; ld.shared.u32 %r0, [tile+8];", 5),
        ("mov.u64 %d1, tile; cvta.shared.u64 %d2, %d1; isspacep.shared %p1, %d2; selp.u32 %r0, 1, 0, %p1;", 1),
        ("st.shared.u32 [tile], 5; atom.shared.cas.b32 %r1, [tile], 5, 9; atom.shared.exch.b32 %r0, [tile], 1;", 9),
        ("st.shared.u32 [tile], 5; atom.shared.inc.u32 %r1, [tile], 5; ld.shared.u32 %r0, [tile];", 0),
        // Scopes: two registers and two labels of one name.
        (
            "mov.u32 %r0, 0; { .reg .u32 t; mov.u32 t, 1; bra L; L: add.u32 %r0, %r0, t; } \
             { .reg .u32 t; mov.u32 t, 2; bra L; add.u32 t, t, 9; L: add.u32 %r0, %r0, t; }",
            3,
        ),
        // An indexed branch.
        (
            "mov.u32 %r1, 2; list: .branchtargets A, B, C; brx.idx %r1, list; A: mov.u32 %r0, 1; bra E; B: mov.u32 %r0, 2; \
             bra E; C: mov.u32 %r0, 3; E:",
            3,
        ),
        // Half precision: bf16 sums by way of a multiplication by one.
        ("mov.b16 %h1, 0x4000; fma.rn.bf16 %h2, %h1, 0x3F80, %h1; cvt.u32.u16 %r0, %h2;", 0x4080),
        ("fma.rn.relu.bf16x2 %r0, 0x3F80BF80, 0x40004000, 0x00000000;", 0x4000_0000),
        ("mad.hi.s32 %r0, -2, 0x40000000, 5;", 4),
        ("lop3.b32 %r0, 0xF0, 0xCC, 0xAA, 0xE8;", 0xE8),
        ("griddepcontrol.wait; mov.u32 %r0, 1;", 1),
    ] {
        assert_eq!(run(body), want, "{body}");
    }
}

#[test]
fn barriers_that_count() {
    for (op, of_threads, want) in [("popc.u32", "%r0", 32), ("and.pred", "%p2", 0), ("or.pred", "%p2", 1)] {
        let select = if of_threads == "%p2" { "selp.u32 %r0, 1, 0, %p2;" } else { "" };
        let body = format!("setp.lt.u32 %p1, %r19, 32; bar.red.{op} {of_threads}, 0, %p1; {select}");
        assert!(run_on(64, &body).unwrap().iter().all(|&v| v == want), "{op}");
    }
    let body = "setp.lt.u32 %p1, %r19, 64; bar.red.and.pred %p2, 0, !%p1; selp.u32 %r0, 1, 0, %p2;";
    assert!(run_on(64, body).unwrap().iter().all(|&v| v == 0));
}

#[test]
fn branches_outside_their_list_and_undefined_registers() {
    let fault = run_on(1, "mov.u32 %r1, 1; list: .branchtargets A; brx.idx %r1, list; A: mov.u32 %r0, 1;").unwrap_err();
    assert_eq!(fault.rule, Rule::OutOfBounds);
    let fault = run_on(1, "add.u32 %r0, %r1, 1;").unwrap_err();
    assert_eq!(fault.rule, Rule::UndefinedRegister);
    assert!(fault.message.contains("%r1"), "{fault}");
    // Defined on one way only.
    let body = "setp.eq.u32 %p1, %r19, 0; @%p1 bra A; mov.u32 %r1, 5; A: add.u32 %r0, %r1, 1;";
    assert_eq!(run_on(2, body).unwrap_err().rule, Rule::UndefinedRegister);
    let body = "setp.eq.u32 %p1, %r19, 9; @%p1 bra A; mov.u32 %r1, 5; A: add.u32 %r0, %r1, 1;";
    assert_eq!(run_on(2, body).unwrap(), [6, 6]);
    let body = "setp.eq.u32 %p1, %r19, 0; @%p1 mov.u32 %r1, 5; @!%p1 mov.u32 %r1, 7; mov.u32 %r0, %r1;";
    assert_eq!(run_on(2, body).unwrap(), [5, 7]);
}
