"""The tools that compile the CUDA kernels and say whether these hold what their names promise and do not spill.

The kernels themselves compile for minutes: `make check-cuda` does that, for every architecture.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_cuda  # noqa: E402
import cuda_object  # noqa: E402
import cuda_toolkit  # noqa: E402
from build_copy import mirror  # noqa: E402
from check_cuda import compare, problems_of, promised, updated  # noqa: E402
from cuda_object import Kernel, Object, parse_ptxas, parse_sass, shorten, waiting_loops  # noqa: E402
from cuda_toolkit import Arch, ToolkitError, find_tool, find_toolkit, parse_archs  # noqa: E402

ARCH = Arch(90, "a")


def toolkit_or_none():
    try:
        return find_toolkit()
    except ToolkitError:
        return None


TOOLKIT = toolkit_or_none()
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason="nvcc was not found")
needs_disassembler = pytest.mark.skipif(
    TOOLKIT is None or not (find_tool("cuobjdump", TOOLKIT) and find_tool("nvdisasm", TOOLKIT)),
    reason="cuobjdump and nvdisasm were not found",
)

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for helper
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z1bPf
    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
SASS = """\
		Function : _Z1aPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
        /*0030*/               @P0 EXIT ;                          /* 0x000000000000094d */
        /*0540*/                   HMMA.16816.F32.BF16 R8, R8, R22, R12 ;  /* 0x0 */
        /*0550*/              @!P1 STL [R1], R2 ;                  /* 0x0 */
        /*0560*/             @!UP1 UMOV UR4, 0x1 ;                 /* 0x0 */
        /*10550*/                  HMMA.16816.F32.BF16 R8, R8, R22, R12 ;  /* 0x0 */
		Function : _Z1bPf
        /*0000*/                   WARPSYNC.COLLECTIVE R7, `(.L_1) ;  /* 0x0 */
"""


def test_ptxas_output_is_read():
    a, b = parse_ptxas(PTXAS, "sm_90a").values()
    assert (a.registers, a.shared, a.stack, a.spill_stores, a.spill_loads) == (18, 512, 0, 0, 0)
    assert (b.registers, b.shared, b.stack, b.spill_stores, b.spill_loads) == (255, 0, 32, 4, 8)
    assert parse_ptxas(PTXAS, "sm_80") == {}


@pytest.mark.parametrize("first", ["sm_86", "sm_89"])
def test_ptxas_output_of_two_architectures_is_kept_apart(first):
    """Of one call, in whatever order: what one spills is not the other's."""
    spills = PTXAS.replace("sm_90a", first)
    none = re.sub(r"\b(4|8|32|64) bytes (spill|stack)", r"0 bytes \2", PTXAS).replace("Used 255", "Used 40")
    log = spills + none.replace("sm_90a", "sm_89" if first == "sm_86" else "sm_86")
    for arch in ("sm_86", "sm_89"):
        a, b = parse_ptxas(log, arch).values()
        assert a.registers == 18 and a.shared == 512
        assert (b.registers, b.stack, b.spill_loads) == ((255, 32, 8) if arch == first else (40, 0, 0)), arch


# A kernel that waits: in each step for one pair of words, then for two at once, with a branch back before the last.
WAITS = """\
		Function : _Z1cPf
        /*0000*/                   LDG.E.64.STRONG.GPU R2, desc[UR4][R2.64] ;  /* 0x0 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;        /* 0x0 */
        /*0020*/                   FADD R2, R2, R2 ;                   /* 0x0 */
        /*0030*/              @!P0 BRA 0x10 ;                          /* 0x0 */
        /*0040*/                   MOV R9, RZ ;                        /* 0x0 */
        /*0050*/                   LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0060*/               @P5 BRA 0x50 ;                          /* 0x0 */
        /*0070*/                   LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0080*/               @P6 LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64+0x200] ;  /* 0x0 */
        /*0090*/              @!P5 BRA 0x70 ;                          /* 0x0 */
        /*00a0*/                   YIELD ;                             /* 0x0 */
        /*00b0*/               @P5 BRA 0x70 ;                          /* 0x0 */
        /*00c0*/               @P4 BRA 0xe0 ;                          /* 0x0 */
        /*00d0*/                   STG.E.64.STRONG.GPU desc[UR4][R2.64], R8 ;  /* 0x0 */
        /*00e0*/               @P3 BRA 0x40 ;                          /* 0x0 */
        /*00f0*/                   EXIT ;                              /* 0x0 */
        /*0100*/                   WARPSYNC.COLLECTIVE R7, 0x110 ;     /* 0x0 */
        /*0110*/                   BRA 0x40 ;                          /* 0x0 */
"""

# A kernel that waits for an mbarrier: the second look and its turns stand behind the end.
WAITS_ON_MBARRIER = """\
		Function : _Z1dPf
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [R153+URZ], R152 ;  /* 0x0 */
        /*0010*/              @!P6 BRA 0x50 ;                          /* 0x0 */
        /*0020*/                   FADD R2, R2, R2 ;                   /* 0x0 */
        /*0030*/               @P3 BRA 0x0 ;                           /* 0x0 */
        /*0040*/                   EXIT ;                              /* 0x0 */
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [R153+URZ], R152 ;  /* 0x0 */
        /*0060*/               @P6 CCTL.IVALL ;                        /* 0x0 */
        /*0070*/              @!P6 BRA 0x50 ;                          /* 0x0 */
        /*0080*/                   BRA 0x20 ;                          /* 0x0 */
"""


def test_disassembly_is_read():
    functions = {name: Counter(i.opcode for i in code) for name, code in parse_sass(SASS.splitlines()).items()}
    assert functions["_Z1aPf"] == {"LDC": 1, "EXIT": 1, "HMMA.16816.F32.BF16": 2, "STL": 1, "UMOV": 1}
    assert functions["_Z1bPf"] == {"WARPSYNC.COLLECTIVE": 1}


def test_loops_that_wait_are_read():
    (code,) = parse_sass(WAITS.splitlines()).values()
    assert [i.target for i in code if i.opcode == "BRA"] == [0x10, 0x50, 0x70, 0x70, 0xE0, 0x40, 0x40]
    assert waiting_loops(code) == (5, 11)
    assert waiting_loops(code[:5]) == (0, 0), "a loop without a look at another block's word"
    assert all(waiting_loops(code) == (0, 0) for code in parse_sass(SASS.splitlines()).values())
    (code,) = parse_sass(WAITS_ON_MBARRIER.splitlines()).values()
    assert waiting_loops(code) == (3, 4)


def test_names_are_short():
    full = "void fastrnn::cuda::step_kernel<fastrnn::LSTMCell, float, (int)4>(fastrnn::cuda::LaunchParams<X>, int)"
    assert shorten(full) == "step_kernel<LSTMCell, float, (int)4>"
    assert shorten("(anonymous namespace)::k(int)") == "k"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (Kernel("k", stack=8), "stack frame"),
        (Kernel("k", spill_loads=8), "spill"),
        (Kernel("k", opcodes=Counter({"STL.64": 1})), "local memory"),
        (Kernel("k", opcodes=Counter({"WARPSYNC.COLLECTIVE": 99})), "emitted twice"),
        (Kernel("step_kernel<float>", opcodes=Counter({"HMMA.1688.F32.TF32": 1})), "unexpected HMMA"),
        (Kernel("grid_mma_kernel<__half>", opcodes=Counter({"FFMA": 1})), "no HMMA"),
        (Kernel("grid_mma_kernel<__half>", opcodes=Counter({"HMMA.16816.F32.BF16": 1})), "no HMMA"),
        (Kernel("grid_mma_kernel<__nv_bfloat16>", opcodes=Counter({"HMMA.16816.F32": 1})), "no HMMA"),
        (Kernel("grid_mma_kernel<float>", opcodes=Counter({"HMMA.16816.F32": 1})), "TF32"),
        (Kernel("grid_ffma_kernel<LSTMCell>", opcodes=Counter({"IMAD": 1})), "no FFMA"),
    ],
)
def test_faults_are_found(kernel, said):
    assert any(said in problem for problem in problems_of(kernel, {}))


def test_what_is_meant_is_no_fault():
    assert not problems_of(Kernel("grid_mma_kernel<__nv_bfloat16>", opcodes=Counter({"HMMA.16816.F32.BF16": 9})), {})
    assert not problems_of(Kernel("grid_ffma_kernel<LSTMCell>", opcodes=Counter({"FFMA": 9})), {})
    assert not problems_of(Kernel("k", stack=8, opcodes=Counter({"LDL": 1})), {"stack": 8, "reason": "stated"})
    assert promised("step_kernel<double>") == {"HMMA": False}
    empty = Kernel(
        "cluster_forward_kernel<LSTMCell, float, PushedFfmaProduct<32, 1>, true>", opcodes=Counter({"EXIT": 1})
    )
    assert not problems_of(empty, {}, "sm_89") and not problems_of(empty, {}, "sm_120")
    assert all("no FFMA" in problems_of(empty, {}, arch)[0] for arch in ("sm_90a", "sm_100"))
    assert promised("grid_kernel<float, FfmaProduct<32, 1> >")["FFMA"]
    assert promised("grid_kernel<float, MmaProduct<float, 4, 1> >")[r"HMMA\.1688\.F32\.TF32"]


def test_table():
    def built(registers, shared=0, name="k<float>"):
        return [Object("a.cu", "sm_90a", 1.0, 100, "", [Kernel(name, registers, shared)])]

    table = updated(built(40), {"allowed": {"other *": {"stack": 8, "reason": "r"}}}, "13.0")
    assert table["allowed"] and not compare(built(48), table, "13.0")
    assert "49 registers, table 40" in compare(built(49), table, "13.0")[0]
    assert not compare(built(99), table, "13.1"), "another compiler's registers are not compared"
    assert "shared memory" in compare(built(40, 16), table, "13.0")[0]
    renamed = compare(built(40, name="new"), table, "13.0")
    assert "not in the table" in renamed[0] and "not in the build" in renamed[1]
    warned = [Object("a.cu", "sm_90a", 1.0, 100, 'a.cu(3): warning #177-D: variable "x"', [])]
    assert "warning" in compare(warned, {}, "13.0")[0]


def test_loops_that_wait_may_not_grow():
    def built(turn, step):
        kernel = Kernel("k<float>", 40, opcodes=Counter({"FADD": 1}), turn=turn, step=step)
        return [Object("a.cu", "sm_90a", 1.0, 100, "", [kernel])]

    table = updated(built(20, 900), {}, "13.0")
    assert table["kernels"]["a.cu"]["k<float>"]["sm_90a"] == [40, 0, 20, 900]
    assert not compare(built(20, 900), table, "13.0") and not compare(built(19, 800), table, "13.0")
    assert "21 instructions in a turn" in compare(built(21, 900), table, "13.0")[0]
    assert "901 instructions in the loop over steps" in compare(built(20, 901), table, "13.0")[0]
    assert not compare(built(21, 900), table, "13.1"), "another compiler's instructions are not compared"
    assert "table 0" in compare(built(20, 900), updated(built(0, 0), {}, "13.0"), "13.0")[0], "waits where it did not"


def test_table_file_has_one_line_a_kernel(tmp_path):
    objects = [Object("a.cu", "sm_80", 1.0, 1, "", [Kernel("k<1>", 4), Kernel("k<2>", 5)])]
    table = updated(objects, {}, "13.0")
    check_cuda.write_table(table, tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == table and text.count("sm_80") == 2
    assert all(line.count("k<") <= 1 for line in text.splitlines())


def test_allowed_patterns():
    table = {"allowed": {"k<LSTMCell, *> @ sm_8?": {"stack": 8, "reason": "r"}}}
    assert check_cuda.allowance(table, "k<LSTMCell, 4>", "sm_80")
    assert not check_cuda.allowance(table, "k<LSTMCell, 4>", "sm_90a")


def test_every_exception_is_explained():
    if check_cuda.TABLE.exists():
        allowed = json.loads(check_cuda.TABLE.read_text())["allowed"]
        assert all(len(entry.get("reason", "")) > 20 for entry in allowed.values())


def test_architectures():
    assert [a.name for a in parse_archs(cuda_toolkit.DEFAULT_ARCHS)] == [
        "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120",
    ]  # fmt: skip
    assert parse_archs("12.0+PTX")[0].gencode == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert parse_archs("8.0, 9.0a") == [Arch(80), Arch(90, "a")]
    firsts = [arch.virtual for arch in parse_archs("8.0;8.6;8.9;9.0a")]
    assert firsts == ["compute_80", "compute_86", "compute_86", "compute_90a"]
    for wrong in ("", "7.5", "sm_90", "9"):
        with pytest.raises(ToolkitError):
            parse_archs(wrong)


def test_a_wrong_cuda_home_is_named(tmp_path):
    with pytest.raises(ToolkitError, match="there is no bin/nvcc"):
        find_toolkit({"CUDA_HOME": str(tmp_path)})


@needs_nvcc
def test_the_toolkit_behind_a_script_is_found(tmp_path):
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{TOOLKIT.nvcc}" "$@"\n')
    script.chmod(0o755)
    for environment in ({"PATH": str(script.parent)}, {"CUDA_HOME": str(tmp_path), "PATH": ""}):
        found = find_toolkit(environment)
        assert found.nvcc == str(script) and found.root == TOOLKIT.root
        assert any((p / "cuda_runtime.h").is_file() for p in found.include_dirs)


@needs_nvcc
def test_a_kernel_cannot_include_torch(tmp_path):
    source = tmp_path / "torchy.cu"
    source.write_text("#include <ATen/core/Tensor.h>\n")
    with pytest.raises(ToolkitError, match=r"ATen/core/Tensor\.h"):
        cuda_object.compile_object(source, [ARCH], TOOLKIT, "")


@needs_nvcc
def test_what_does_not_compile_is_a_problem(tmp_path, capsys):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void k() { nothing_of_this_name(); }\n")
    assert check_cuda.main([str(source), "--archs", "8.0", "--table", str(tmp_path / "none.json"), "--update"]) == 1
    assert "wrong.cu does not compile for sm_80" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


@needs_nvcc
def test_a_stack_frame_is_found(tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void indexed_kernel(float* x, int n) {\n"
        "  float* two[2] = {x, x + n};\n"
        "  for (int t = 0; t < n; ++t) two[t & 1][t] += 1.f;\n"
        "  float many[64];\n"
        "  for (int i = 0; i < 64; ++i) many[i] = x[i];\n"
        "  for (int i = 0; i < n; ++i) x[i] = many[(i * 7) & 63];\n"
        "}\n"
    )
    for made in cuda_object.compile_object(source, [Arch(86), Arch(89)], TOOLKIT, ""):
        (kernel,) = made.kernels
        assert kernel.name == "indexed_kernel" and any("stack frame" in p for p in problems_of(kernel, {})), made.arch


@needs_disassembler
def test_matrix_instructions_are_seen():
    """The emulator's test kernels use them under names that promise none."""
    mutants, headers = ROOT / "tests/hostbuild/mutants.cu", cuda_object.headers_digest()
    (made,) = cuda_object.compile_object(mutants, [ARCH], TOOLKIT, headers)
    kernels = {kernel.name: kernel for kernel in made.kernels}
    operations = kernels["operations_kernel"]
    for opcode in ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "HMMA.1688.F32.TF32"):
        assert operations.opcodes[opcode] > 0
    assert "unexpected HMMA" in problems_of(operations, {})[0]
    assert kernels["words_kernel"].opcodes["FFMA"] > 0


@needs_nvcc
def test_bounded_spins_compile(tmp_path):
    """The debug build's trap; a whole kernel of it takes 10 s more."""
    source = tmp_path / "bounded.cu"
    source.write_text(
        "#define FASTRNN_BOUNDED_SPINS 16777216\n"
        '#include "cuda/grid.cuh"\n'
        "__global__ void waits_kernel(const uint64_t* words, uint64_t* out) {\n"
        "  fastrnn::cuda::take([&](int n) { return words + n * 64; }, 4, 1u, true,\n"
        "                      *reinterpret_cast<uint64_t(*)[4][2]>(out));\n"
        "}\n"
    )
    (made,) = cuda_object.compile_object(source, [ARCH], TOOLKIT, cuda_object.headers_digest())
    (kernel,) = made.kernels
    assert not kernel.opcodes or kernel.opcodes["BPT.TRAP"] > 0, kernel.opcodes


def test_command_line_without_nvcc(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_cuda.py")],
        env={"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "check_cuda: CUDA_HOME=" in done.stderr


def test_the_tree_to_build_in_follows_the_working_tree(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "csrc").mkdir(parents=True)
    for name in ("setup.py", "csrc/a.cu", "csrc/b.cu", "csrc/c.so"):
        (source / name).write_text(name)
    mirror(source, target)
    (target / "build").mkdir()
    (target / "build" / "a.o").write_text("kept")
    old = (target / "csrc/a.cu").stat().st_mtime_ns
    (source / "csrc/b.cu").unlink()
    (source / "setup.py").write_text("new")
    mirror(source, target)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == [
        "build/a.o", "csrc/a.cu", "setup.py",
    ]  # fmt: skip
    assert (target / "setup.py").read_text() == "new" and (target / "csrc/a.cu").stat().st_mtime_ns == old
