// Runs CUDA-style kernels on the CPU, for tests on machines without a GPU.
//
// Every thread of a block is a fiber; blocks run one after another (OpenMP spreads them over cores). Warp
// collectives wait for all 32 lanes and then act as the PTX manual says. What would be undefined on a GPU is made
// visible: shared memory starts as NaN, the target of an asynchronous copy is NaN until its group is waited for,
// shared memory ends at an unmapped page, warps are run in a shuffled order, and lanes that meet at different
// collectives end the program with a sentence.
#pragma once

#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace local_attention {
namespace emulation {

constexpr int LANES = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_LIMIT = 227 << 10;  // what one block may ask for on sm_90
constexpr uint32_t SHARED_START = 1024;     // shared addresses are not pointers: the first one is not 0
constexpr int MULTIPROCESSORS = 4;          // small, so that small problems already fill the device

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

// --- fibers ----------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores the stack pointer in *from and continues at `to`. The
// system's swapcontext does the same with two system calls, which would be most of a test's time.
extern "C" void local_attention_switch_stacks(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden local_attention_switch_stacks
.globl local_attention_switch_stacks
.type local_attention_switch_stacks,@function
local_attention_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size local_attention_switch_stacks,.-local_attention_switch_stacks
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 2;
    top[1] = nullptr;
    top[0] = reinterpret_cast<void*>(entry);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { local_attention_switch_stacks(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t state;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = STACK_BYTES;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

inline char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory for its threads");
  return static_cast<char*>(p);
}

// --- blocks ----------------------------------------------------------------------------------------------------

enum class Meeting { NONE, SHUFFLE, WARP_BARRIER, LOAD_MATRIX, MMA, BLOCK_BARRIER, DONE };

inline const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::SHUFFLE: return "a shuffle";
    case Meeting::WARP_BARRIER: return "a warp barrier";
    case Meeting::LOAD_MATRIX: return "a matrix load";
    case Meeting::MMA: return "a matrix product";
    case Meeting::BLOCK_BARRIER: return "a block barrier";
    case Meeting::DONE: return "its end";
    default: return "nothing";
  }
}

struct Copy {
  char* target;
  const void* source;
  uint32_t bytes;
  bool valid;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  Meeting waiting = Meeting::NONE;
  std::vector<Copy> open;                 // issued, not committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  Meeting meeting = Meeting::NONE;
  int arrived = 0;
  void* operands[LANES];  // each lane's own, on its stack
};

// One per CPU thread, used for one block after another.
struct Machine {
  Context scheduler;
  Fiber fibers[MAX_THREADS];
  Warp warps[MAX_THREADS / LANES];
  int threads = 0, thread = 0, arrived = 0, done = 0;
  int64_t block = 0;
  char* pages = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  Fiber& fiber() { return fibers[thread]; }
  void yield() { fiber().context.switch_to(scheduler); }
};

inline Machine& machine() {
  static thread_local Machine* instance = new Machine;  // never freed: fibers may outlive any scope here
  return *instance;
}

inline void fiber_main() {
  while (true) {
    Machine& m = machine();
    m.body(m.arguments);
    m.fiber().waiting = Meeting::DONE;
    m.fiber().open.clear();
    m.fiber().groups.clear();
    ++m.done;
    m.yield();
  }
}

inline void complain_about_waiting(Machine& m) {
  for (int t = 0; t < m.threads; ++t)
    for (int u = t / LANES * LANES; u < t; ++u)
      if (m.fibers[t].waiting != m.fibers[u].waiting) {
        char text[200];
        std::snprintf(text, sizeof text, "threads %d and %d of one warp part: one waits at %s, one at %s", u, t,
                      name_of(m.fibers[u].waiting), name_of(m.fibers[t].waiting));
        fail(text);
      }
  fail("warps wait at a block barrier that others never reach");
}

inline void run_block(Machine& m, int64_t block, int threads, size_t shared_bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t room = (SHARED_LIMIT + page - 1) / page * page;
  if (!m.pages) {
    m.pages = map_pages(room + page);
    mprotect(m.pages + room, page, PROT_NONE);
  }
  m.shared_bytes = (shared_bytes + 15) / 16 * 16;
  m.shared = m.pages + room - m.shared_bytes;
  std::memset(m.shared, 0xff, m.shared_bytes);
  m.block = block;
  m.threads = threads;
  m.arrived = m.done = 0;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = m.fibers[t];
    if (!fiber.stack) {
      fiber.stack = map_pages(STACK_BYTES);
      fiber.context.prepare(fiber.stack, fiber_main);
    }
    fiber.waiting = Meeting::NONE;
  }
  const int warps = threads / LANES;
  uint32_t random = static_cast<uint32_t>(block) * 2654435761u + 12345u;
  while (m.done < threads) {
    bool progress = false;
    random = random * 1664525u + 1013904223u;
    const int first = static_cast<int>((random >> 16) % warps), step = (random >> 8) & 1 ? 1 : warps - 1;
    for (int w = 0, warp = first; w < warps; ++w, warp = (warp + step) % warps)
      for (int t = warp * LANES; t < (warp + 1) * LANES; ++t)
        if (m.fibers[t].waiting == Meeting::NONE) {
          progress = true;
          m.thread = t;
          m.scheduler.switch_to(m.fibers[t].context);
        }
    if (!progress) complain_about_waiting(m);
  }
}

// Calls `act(operands of the 32 lanes)` once all lanes of the warp are here.
template <typename Operand, typename Act>
void meet(Meeting meeting, Operand* operand, const Act& act) {
  Machine& m = machine();
  const int warp_start = m.thread / LANES * LANES;
  Warp& warp = m.warps[m.thread / LANES];
  if (warp.arrived == 0) {
    warp.meeting = meeting;
  } else if (warp.meeting != meeting) {
    char text[200];
    std::snprintf(text, sizeof text, "lanes of one warp meet at different places: %s and %s",
                  name_of(warp.meeting), name_of(meeting));
    fail(text);
  }
  warp.operands[m.thread - warp_start] = operand;
  if (++warp.arrived < LANES) {
    m.fiber().waiting = meeting;
    m.yield();
    return;
  }
  warp.arrived = 0;
  act(reinterpret_cast<Operand**>(warp.operands));
  for (int t = warp_start; t < warp_start + LANES; ++t) m.fibers[t].waiting = Meeting::NONE;
}

inline void block_barrier() {
  Machine& m = machine();
  if (++m.arrived < m.threads) {
    m.fiber().waiting = Meeting::BLOCK_BARRIER;
    m.yield();
    return;
  }
  m.arrived = 0;
  for (int t = 0; t < m.threads; ++t)
    if (m.fibers[t].waiting == Meeting::BLOCK_BARRIER) m.fibers[t].waiting = Meeting::NONE;
}

// --- shared memory ---------------------------------------------------------------------------------------------

inline char* shared_pointer(uint32_t address, uint32_t bytes, const char* user) {
  Machine& m = machine();
  if (address % bytes || address < SHARED_START || address - SHARED_START + bytes > m.shared_bytes) {
    char text[200];
    std::snprintf(text, sizeof text, "%s at shared byte %ld of %zu, which is outside or not a multiple of %u", user,
                  static_cast<long>(address) - static_cast<long>(SHARED_START), m.shared_bytes, bytes);
    fail(text);
  }
  return m.shared + (address - SHARED_START);
}

inline void finish(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.target, copy.source, copy.bytes);
  else
    std::memset(copy.target, 0, copy.bytes);
}

inline void copy_async(uint32_t target, const void* source, uint32_t bytes, bool valid) {
  char* to = shared_pointer(target, bytes, "an asynchronous copy");
  if (reinterpret_cast<uintptr_t>(source) % bytes) fail("an asynchronous copy from an unaligned address");
  std::memset(to, 0xff, bytes);
  machine().fiber().open.push_back({to, source, bytes, valid});
}

inline void copy_commit() {
  Fiber& fiber = machine().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void copy_wait(int pending) {
  auto& groups = machine().fiber().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

// --- matrices --------------------------------------------------------------------------------------------------

// How often eight rows of a matrix load shared a bank, beyond the first, since the last question.
inline std::atomic<int64_t>& bank_conflicts() {
  static std::atomic<int64_t> count{0};
  return count;
}

struct MatrixLoad {
  uint32_t address;
  uint16_t row[8];
  uint32_t result[4];
};

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane l gives the address of row l % 8 of matrix l / 8; lane l
// receives elements 2 * (l % 4) and the next of row l / 4, or of the transposed matrix. A lane reads its row when it
// arrives: the instruction orders nothing, so what another lane has yet to write must not be seen.
inline void load_matrices(uint32_t (&result)[4], uint32_t address, bool transposed) {
  MatrixLoad own{address, {}, {}};
  std::memcpy(own.row, shared_pointer(address, 16, "a matrix load"), sizeof own.row);
  meet(Meeting::LOAD_MATRIX, &own, [&](MatrixLoad** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t cells[8][8];
      int rows_of_bank[8] = {}, most = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32_t at = lanes[matrix * 8 + row]->address;
        std::memcpy(cells[row], lanes[matrix * 8 + row]->row, sizeof own.row);
        bool repeated = false;  // rows at one address are one access
        for (int other = 0; other < row; ++other) repeated |= lanes[matrix * 8 + other]->address == at;
        if (!repeated) ++rows_of_bank[at / 16 % 8];
      }
      for (int count : rows_of_bank) most = count > most ? count : most;
      if (most > 1) bank_conflicts() += most - 1;
      for (int lane = 0; lane < LANES; ++lane) {
        const int a = lane / 4, b = lane % 4 * 2;
        const uint16_t low = transposed ? cells[b][a] : cells[a][b];
        const uint16_t high = transposed ? cells[b + 1][a] : cells[a][b + 1];
        lanes[lane]->result[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
  for (int i = 0; i < 4; ++i) result[i] = own.result[i];
}

struct Product {
  const uint32_t* a;
  uint32_t b[2];
  float* c;
};

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32. Of A, lane l holds rows l / 4 and 8 more, columns 2 * (l % 4) and
// 8 more; of B, column l / 4; of C, rows like A and columns 2 * (l % 4).
template <typename Widen>
void matrix_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Widen& widen) {
  Product own{a, {b0, b1}, c};
  meet(Meeting::MMA, &own, [&](Product** lanes) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
          A[group + i % 2 * 8][pair + i / 2 * 8 + j] = widen(static_cast<uint16_t>(lanes[lane]->a[i] >> 16 * j));
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          B[pair + i * 8 + j][group] = widen(static_cast<uint16_t>(lanes[lane]->b[i] >> 16 * j));
    }
    float C[16][8] = {};
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    for (int lane = 0; lane < LANES; ++lane)
      for (int i = 0; i < 4; ++i) lanes[lane]->c[i] += C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

template <typename Value>
Value shuffle(Value value, int source) {
  struct Exchange {
    Value value;
    int source;
    Value result;
  } own{value, source, value};
  meet(Meeting::SHUFFLE, &own, [](Exchange** lanes) {
    for (int lane = 0; lane < LANES; ++lane) lanes[lane]->result = lanes[lanes[lane]->source % LANES]->value;
  });
  return own.result;
}

inline void warp_barrier() {
  int own = 0;
  meet(Meeting::WARP_BARRIER, &own, [](int**) {});
}

template <typename Call>
void run_grid(int64_t blocks, int threads, size_t shared_bytes, const Call& call) {
  if (threads % LANES || threads > MAX_THREADS) fail("a block that is not whole warps");
  if (shared_bytes > SHARED_LIMIT) fail("more shared memory than a block may have");
#pragma omp parallel for schedule(dynamic)
  for (int64_t block = 0; block < blocks; ++block) {
    Machine& m = machine();
    m.body = [](void* arguments) { (*static_cast<const Call*>(arguments))(); };
    m.arguments = const_cast<Call*>(&call);
    run_block(m, block, threads, shared_bytes);
  }
}

}  // namespace emulation
}  // namespace local_attention
