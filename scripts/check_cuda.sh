#!/usr/bin/env bash
# Builds the program with the feature `cuda`, on any x86-64 Linux machine: no GPU, no driver and no installed CUDA needed.
# Compiles this project's own CUDA kernel for every generation of GPUs and prints its registers, shared memory and spills;
# then builds and links the program and checks which CUDA libraries it wants and how it starts without a driver.
#
#   scripts/check_cuda.sh            everything
#   scripts/check_cuda.sh toolkit    only fetch the toolkit, and print the environment that a build with it needs
#   scripts/check_cuda.sh kernel     only compile the kernel
#
# Variables: CUDA_COMPUTE_CAP (80), the GPU that candle's kernels are compiled for: 75, 80, 86, 89, 90, 100 or 120.
#
# The toolkit (CUDA 13.0, 1.2 GB unpacked) is put together once in .cache/cuda from NVIDIA's packages on PyPI; the program
# is built in target/cuda. Needs Python with pip, GCC with C++, and Rust. The first build takes long: candle's kernels are
# a hundred source files. Where CUDA is installed, none of this is needed: see "Build for a GPU" in src/guide/devices.md.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3
    nvidia-curand==10.4.0.35
)
step() { printf '\n== %s\n' "$*"; }
fail() { echo "error: $*" >&2; exit 1; }

what=${1:-all}
case $what in all | toolkit | kernel) ;; *) fail "expected \`toolkit\`, \`kernel\` or nothing, got \`$what\`" ;; esac
for tool in python3 g++ gcc cargo readelf; do
    command -v "$tool" >/dev/null || fail "\`$tool\` is needed"
done

# The driver's library comes with a driver, never with pip. Linking needs only its names: a library that has every
# function of the driver that cudarc declares, and answers each with CUDA_ERROR_STUB_LIBRARY, as NVIDIA's own stub does.
make_driver_stub() {
    local stubs=$1 manifest
    manifest=$(cargo metadata --locked --format-version 1 --features cuda |
        python3 -c 'import json, sys
print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
    grep -oE 'fn cu[A-Z][A-Za-z0-9_]*' "$(dirname "$manifest")/src/driver/sys/mod.rs" | sort -u |
        sed -E 's/^fn (.*)$/int \1(void) { return 34; }/' >"$stubs/libcuda.c"
    gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so" "$stubs/libcuda.c"
    ln -sf libcuda.so "$stubs/libcuda.so.1"
}

# Where a toolkit has `lib64`, libraries without a version, and stubs, the packages have none of them.
make_toolkit() {
    echo "fetching CUDA (600 MB, once) ..." >&2
    rm -rf "$toolkit.part"
    mkdir -p "$toolkit.part"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --target "$toolkit.part/site" "${packages[@]}"
    local root=$toolkit.part/site/nvidia/cu13 library
    [ -x "$root/bin/nvcc" ] || fail "no bin/nvcc in the packages; expected it at $root/bin/nvcc"
    for library in cudart cublas cublasLt curand nvrtc; do
        (cd "$root/lib" && ln -s "$(ls "lib$library".so.*)" "lib$library.so")
    done
    ln -s lib "$root/lib64"
    mkdir "$root/lib/stubs"
    make_driver_stub "$root/lib/stubs"
    printf '%s\n' "${packages[@]}" >"$toolkit.part/packages"
    rm -rf "$toolkit"
    mv "$toolkit.part" "$toolkit"
}

toolkit=$PWD/.cache/cuda
if [ "$(cat "$toolkit/packages" 2>/dev/null)" != "$(printf '%s\n' "${packages[@]}")" ]; then make_toolkit; fi
export CUDA_HOME=$toolkit/site/nvidia/cu13
export CUDA_PATH=$CUDA_HOME NVCC=$CUDA_HOME/bin/nvcc PATH=$CUDA_HOME/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}

if [ "$what" = toolkit ]; then
    printf 'export %s\n' "CUDA_HOME=$CUDA_HOME" "CUDA_PATH=$CUDA_HOME" "NVCC=$NVCC" "PATH=$CUDA_HOME/bin:\$PATH" \
        "CUDA_COMPUTE_CAP=$CUDA_COMPUTE_CAP"
    exit
fi

step "our kernel: registers, shared memory and spills on each generation of GPUs"
ptx=target/cuda/check
mkdir -p "$ptx"
for format in f16 bf16 f32; do
    source=src/attention/ragged/kernels/ragged_decode_$format.cu
    for arch in 75 80 90 100 120; do
        nvcc -std=c++17 -O3 -ptx -arch="compute_$arch" -o "$ptx/ragged_decode_${format}_$arch.ptx" "$source"
        ptxas -v -arch="sm_$arch" -o "$ptx/ragged_decode_${format}_$arch.cubin" "$ptx/ragged_decode_${format}_$arch.ptx" \
            >"$ptx/ptxas.log" 2>&1 || { cat "$ptx/ptxas.log" >&2; fail "ptxas refused $source"; }
        python3 - "$ptx/ptxas.log" "$format" "$arch" <<'PYTHON'
import re, sys
log, storage, arch = open(sys.argv[1]).read(), sys.argv[2], sys.argv[3]
kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
                     r"spill loads.*?Used (\d+) registers.*?(\d+) bytes smem", log, re.S)
if len(kernels) != 15:
    sys.exit(f"error: expected 15 kernels for {storage} on sm_{arch}, got {len(kernels)}")
spilled = [kernel[0] for kernel in kernels if any(int(number) for number in kernel[1:4])]
registers, shared = [int(kernel[4]) for kernel in kernels], [int(kernel[5]) for kernel in kernels]
print(f"{storage:>4} sm_{arch:<3}: {len(kernels)} kernels, {min(registers)} to {max(registers)} registers, "
      f"{min(shared)} to {max(shared)} bytes of shared memory, spills: {', '.join(spilled) or 'none'}")
if spilled:
    sys.exit("error: registers are spilled to memory")
PYTHON
    done
done
if [ "$what" = kernel ]; then exit; fi

step "lints of what only the feature \`cuda\` compiles, its tests included"
cargo clippy --release --locked --all-targets --features cuda --target-dir target/cuda -- -D warnings

step "build with the feature \`cuda\` for compute capability $CUDA_COMPUTE_CAP"
started=$SECONDS
cargo build --release --locked --features cuda --target-dir target/cuda
binary=target/cuda/release/adaptive-kvcache
echo "built $binary in $((SECONDS - started)) s"

step "what the program needs"
needed=$(readelf -d "$binary" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p' | sort)
echo "$needed"
for library in libcuda.so libcudart.so libcublas.so libcurand.so; do
    grep -q "^$library" <<<"$needed" || fail "\`$binary\` is not linked with $library"
done
for format in f16 bf16 f32; do
    grep -qs "\.entry ragged_decode_${format}_w128_g8" target/cuda/release/build/adaptive-kvcache-*/out/ragged_decode_$format.ptx ||
        fail "the build has not compiled this project's own kernels for $format"
done

# Runs the program with these library folders; an exit status other than the expected one is an error.
run() {
    local expected=$1 folders=$2 status=0
    shift 2
    LD_LIBRARY_PATH=$folders "$binary" "$@" || status=$?
    echo "exit status $status"
    [ "$status" = "$expected" ] || fail "expected exit status $expected"
}

if ldconfig -p | grep -q 'libcuda\.so\.1'; then
    echo "this machine has a driver: not looking at what happens without one"
else
    step "start without a driver"
    run 127 "$CUDA_HOME/lib" --version
    step "start with a driver's library, but without a GPU"
    run 0 "$CUDA_HOME/lib:$CUDA_HOME/lib/stubs" --version
fi

step "all passed"
