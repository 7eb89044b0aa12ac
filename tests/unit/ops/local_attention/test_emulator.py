"""The emulator of CUDA shows the mistakes that a GPU may hide; the arithmetic of tiles, in C++."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cogview2.ops.local_attention.toolchain import CSRC

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "cuda/launch.cuh"
using namespace local_attention;
void kernel(int mistake, const char* source, float* seen) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = lane_index();
  BODIES
}
int main(int, char** arguments) {
  alignas(16) char source[64] = {};
  float seen[2] = {-1, -1};
  Failure failure;
  const char* from = source;
  float* to = seen;
  launch(failure, kernel, 1, 64, 1024, nullptr, std::atoi(arguments[1]), from, to);
  std::printf("%f %f", std::abs(seen[0]), std::abs(seen[1]));
}
"""


MISTAKES = {
    "unset shared memory": ("seen[0] = shared[5];", "nan 1.0"),
    "copy not waited for": (
        "copy_async(shared_address(shared), source, true); copy_commit(); seen[0] = shared[0]; copy_wait<0>(); "
        "seen[1] = shared[0];",
        "nan 0.0",
    ),
    "wrong group waited for": (
        "copy_async(shared_address(shared), source, true); copy_commit(); "
        "copy_async(shared_address(shared + 4), source, true); copy_commit(); copy_wait<1>(); "
        "seen[0] = shared[0]; seen[1] = shared[4];",
        "0.000000 nan",
    ),
    "lanes part": (
        "if (lane < 7) warp_barrier(); else shuffle(lane, 0);",
        "lanes of one warp meet at different places: a warp barrier and a shuffle",
    ),
    "lanes leave": (
        "if (lane == 3) return; warp_barrier();",
        "threads 0 and 3 of one warp part: one waits at a warp barrier, one at its end",
    ),
    "a warp leaves": (
        "if (warp_index() == 0) return; block_barrier();",
        "warps wait at a block barrier that others never reach",
    ),
    "load beyond shared memory": (
        "uint32_t r[4]; load_matrices(r, shared_address(shared) + 1024);",
        "a matrix load at shared byte 1024 of 1024",
    ),
    "unaligned copy": (
        "copy_async(shared_address(shared) + 8, source, true);",
        "an asynchronous copy at shared byte 8 of 1024",
    ),
}


def compiled(folder: Path, source: str) -> Path:
    """Compile a program for the emulator and return where it is."""
    (folder / "program.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O0", "-DLOCAL_ATTENTION_EMULATED", f"-I{CSRC}"]
    subprocess.run([*command, str(folder / "program.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


def test_the_emulator_shows_mistakes(tmp_path: Path) -> None:
    bodies = [
        f"if (mistake == {number}) {{ {body} return; }}" for number, (body, _) in enumerate(MISTAKES.values())
    ]
    program = compiled(tmp_path, PROGRAM.replace("BODIES", "\n  ".join(bodies)))
    for number, (name, (_, message)) in enumerate(MISTAKES.items()):
        result = subprocess.run([program, str(number)], capture_output=True, text=True, timeout=60)
        assert message in result.stdout + result.stderr, name


def test_tiles(tmp_path: Path) -> None:
    """The arithmetic of tile.h against its definitions, in C++."""
    source = """
    #include <cstdio>
    #include <initializer_list>
    #include "tile.h"
    using namespace local_attention;
    #define EXPECT(condition) if (!(condition)) { std::printf("line %d: " #condition, __LINE__); return 1; }
    int main() {
      for (int divisor = 16; divisor < 300; ++divisor)
        for (int n = 0; n < 4000 && n * divisor < 1 << 20; ++n)
          EXPECT(tile::divide_by(n, tile::reciprocal(divisor)) == n / divisor);
      for (int extent : {4, 8, 16})
        for (int ratio = 1; ratio < 40; ++ratio) {
          int most = 0;
          for (int start = 0; start < 40 * extent; start += extent)
            most = highest(most, (start + extent - 1) / ratio - start / ratio + 1);
          EXPECT(most <= tile::coarse_extent(extent, ratio) && tile::coarse_extent(extent, ratio) <= most + 1);
        }
      for (int lane = 0; lane < 32; ++lane) {  // the two middle matrices change places
        const int source = tile::transposed_source(lane);
        EXPECT(tile::transposed_source(source) == lane);
        EXPECT(tile::loaded_partner(source) == lane % 16 && tile::loaded_half(source) == lane / 16);
      }
      const Window windows[] = {{1, 1, 1, 1, 0}, {2, 1, 3, 2, 0}, {4, 0, 2, 2, 1}, {0, 0, 0, 0, 0}};
      for (const Window& w : windows) {
        const int columns = tile::halo_extent(window_columns(w)), rows = tile::halo_extent(window_rows(w));
        const Window back = mirrored(w);
        for (int i = 0; i < 16; ++i)
          for (int n = 0; n < rows * columns; ++n) {
            const int u = n / columns - i / 4, v = n % columns - i % 4;  // from cell i to cell n, both in the halo
            EXPECT(tile::query_sees(w, i, n / columns, n % columns) == sees(w, u - w.top, v - w.left));
            EXPECT(tile::key_seen_by(w, i, n / columns, n % columns) == sees(w, back.top - u, back.left - v));
          }
        int seen = 0;
        for (int group = 0; group * 16 < rows * columns; ++group)
          for (int lane = 0; lane < 32; ++lane)
            seen += __builtin_popcount(tile::element_bits(lane, group, columns, rows * columns,
                [&](int i, int row, int column) { return tile::query_sees(w, i, row, column); }));
        int cells = 0;
        for (int u = -w.top; u <= w.bottom; ++u)
          for (int v = -w.left; v <= w.right; ++v) cells += sees(w, u, v);
        EXPECT(seen == 16 * cells);
      }
      std::printf("all good");
    }
    """
    result = subprocess.run([compiled(tmp_path, source)], capture_output=True, text=True, timeout=60)
    assert result.stdout == "all good"
