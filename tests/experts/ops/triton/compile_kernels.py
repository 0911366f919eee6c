"""Compiles the kernels without a card, for a compute capability, and prints what came out, one JSON object a line.

    python compile_kernels.py defaults|candidates 90

`defaults`: the tiles for fewest and for most rows, and the kernels around the matmuls;
`candidates`: all that tuning may try.

In a process of its own: the tests beside it run the same kernels in Triton's interpreter, and a process
has one or the other.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experts.ops._triton.combine import combine_kernel, row_table_kernel
from experts.ops._triton.grouped_matmul import KERNELS, constants
from experts.ops._triton.quantise_rows import quantise_rows_kernel
from experts.ops._triton.sort import histogram_kernel, scatter_kernel
from experts.ops._triton.tiles import tile_table_kernel
from experts.ops.known_cards import KNOWN_CARDS, ROW_BUCKETS
from experts.ops.slot_format import SlotFormat
from experts.quant.schemes import build_scheme
from experts.spec import ExpertSpec

HIDDEN, INTERMEDIATE = 7168, 2048  # DeepSeek-V3
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(capability, kernel, arguments, constexprs, **options):
    """arguments: name to Triton type; a name in neither is an error of the compiler's. Pointers are aligned."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if arguments.get(name, "")[:1] == "*"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+\.\S+?)[ ;]", ptx))),
        "tcgen05": sorted(set(re.findall(r"tcgen05\.mma\.\S+", ptx))),
        "mma_sync": "mma.sync" in ptx,
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "async_copy_bytes": sorted({int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\S* .*?, (0x\w+)", ptx)}),
    }


def compile_matmul(capability, scheme, projection, config, weight_dtype):
    kernels = KERNELS[scheme]
    arguments = {
        "x_ptr": "*fp8e4nv" if kernels.activation_group else "*bf16",
        "token_rows_ptr": "*i32",
        "tiles_ptr": "*i64",
        "out_ptr": "*bf16",
        "num_rows": "i32",
    }
    values = constants(projection, config, weight_dtype, projection.k_stored, projection.out_columns)
    if config.kernel == "prefill":
        values["NUM_PROGRAMS"] = 132 * config.programs_per_sm
    if kernels.activation_group:
        arguments["x_scale_ptr"] = "*fp32"
    else:
        values["x_scale_ptr"] = None
    kernel = kernels.prefill if config.kernel == "prefill" else kernels.decode
    return compile_kernel(capability, kernel, arguments, values, num_warps=config.warps, num_stages=config.stages)


def compile_others(capability):
    """Sorting, tile table, activations to fp8, combine: as their launchers call them."""
    i32, i64, f32 = "*i32", "*i64", "*fp32"
    sizes = {"num_rows": "i32", "num_groups": "i32", "num_experts": "i32", "num_blocks": "i32", "bound": "i32"}
    named = {
        tile_table_kernel: (
            {"slots_ptr": i32, "offsets_ptr": i32, "addresses_ptr": i64, "tiles_ptr": i64},
            {"BLOCK_R": 64, "BLOCK_T": 32, "BLOCK_S": 32},
        ),
        row_table_kernel: (
            {"token_rows_ptr": i32, "offsets_ptr": i32, "table_ptr": i32},
            {"BLOCK_R": 128, "BLOCK_S": 32},
        ),
        combine_kernel: (
            {"out_ptr": "*bf16", "weights_ptr": f32, "table_ptr": i32, "partial_ptr": f32},
            {"H": HIDDEN, "BLOCK_H": 1024, "BLOCK_S": 32},
        ),
        histogram_kernel: ({"ids_ptr": i64, "counts_ptr": i32}, {"BLOCK_R": 256, "BLOCK_E": 32}),
        scatter_kernel: (
            {"ids_ptr": i64, "ends_ptr": i32, "order_ptr": i32, "offsets_ptr": i32},
            {"BLOCK_R": 256, "BLOCK_E": 32},
        ),
    }
    for kernel, (pointers, values) in named.items():
        arguments = pointers | {name: kind for name, kind in sizes.items() if name in kernel.arg_names}
        yield kernel.__name__, compile_kernel(capability, kernel, arguments, values)
    pointers = {"x_ptr": "*bf16", "code_ptr": "*fp8e4nv", "scale_ptr": f32}
    shape = {"X_STRIDE": HIDDEN, "K": HIDDEN, "K_STORED": HIDDEN}
    for name, values in {
        "quantise_rows_kernel by 128": {"NUM_GROUPS": 56, "GROUP": 128, "BLOCK_G": 16},
        "quantise_rows_kernel by row": {"NUM_GROUPS": 1, "GROUP": 8192, "BLOCK_G": 1},
    }.items():
        yield name, compile_kernel(capability, quantise_rows_kernel, pointers, shape | values, num_warps=8)


def main(which, capability):
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    if which == "defaults":
        for name, row in compile_others(capability):
            print(json.dumps({"kernel": name} | row), flush=True)
    for scheme, buckets in KNOWN_CARDS["H100"].items():
        form = SlotFormat(spec, build_scheme(scheme, torch.bfloat16), "silu")
        done = set()
        for bucket in ROW_BUCKETS:
            configs = buckets[bucket]
            if which == "defaults":
                configs = configs[:1] if bucket in (ROW_BUCKETS[0], ROW_BUCKETS[-1]) else ()
            for config in configs:
                for name in ("up", "down"):
                    if (name, config) in done:
                        continue
                    done.add((name, config))
                    row = {"scheme": scheme, "projection": name, "config": config.to_json()}
                    try:
                        row |= compile_matmul(capability, scheme, getattr(form, name), config, form.scheme.codes_dtype)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {error}"[-500:]
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
