#include "warp.h"

#include <string.h>

#include <algorithm>

namespace sta {
namespace emulator {

namespace {

typedef float Row __attribute__((vector_size(8 * sizeof(float))));  // of a 16 x 8 matrix

std::string shuffle(const LaneOperands (&lanes)[kLanes]) {
  uint32_t values[kLanes];
  const int mask = static_cast<const Shuffle*>(lanes[0].in)->mask;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Shuffle& in = *static_cast<const Shuffle*>(lanes[lane].in);
    if (in.mask != mask) return "lanes of a warp shuffle with different masks";
    if (mask < 0 || mask >= kLanes)
      return "a shuffle's mask is " + std::to_string(mask) + ", must be below 32";
    values[lane] = in.value;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    memcpy(lanes[lane].out, &values[lane ^ mask], sizeof(uint32_t));
  return "";
}

// One pass serves as many of the 8 rows as lie in different banks; the same row twice is one row.
int passes(const char* const* rows) {
  constexpr int kGroups = 8;  // 32 banks of 4 bytes, a row in 4 of them
  int in_group[kGroups] = {};
  for (int i = 0; i < 8; ++i) {
    const bool seen = std::find(rows, rows + i, rows[i]) != rows + i;
    if (!seen) ++in_group[reinterpret_cast<uintptr_t>(rows[i]) / SharedMemory::kUnit % kGroups];
  }
  return *std::max_element(in_group, in_group + kGroups);
}

std::string load(const LaneOperands (&lanes)[kLanes], bool transposed, int warp, int64_t interval,
                 SharedMemory& memory, Counters& counters) {
  const char* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = static_cast<const char*>(lanes[lane].in);
    std::string fault = memory.check_access(rows[lane], "a matrix row");
    if (fault.empty()) fault = memory.matrix_row_read(rows[lane], warp, interval);
    if (!fault.empty()) return fault;
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    ++counters.load_phases;
    counters.bank_conflicts += passes(rows + 8 * matrix) - 1;
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) memcpy(values[row], rows[8 * matrix + row], 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = transposed ? values[2 * t][g] : values[g][2 * t];
      const uint32_t high = transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
      static_cast<uint32_t*>(lanes[lane].out)[matrix] = low | high << 16;
    }
  }
  return "";
}

template <float (*to_float)(uint16_t)>
void multiply_add_fragments(const LaneOperands (&lanes)[kLanes]) {
  float a[16][16];
  float b[16][8];
  float c[16][8];
  const auto put = [](uint32_t pair, float& first, float& second) {
    first = to_float(static_cast<uint16_t>(pair));
    second = to_float(static_cast<uint16_t>(pair >> 16));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const MatrixOperands& in = *static_cast<const MatrixOperands*>(lanes[lane].in);
    const float* sums = static_cast<const float*>(lanes[lane].out);
    const int g = lane / 4, k = 2 * (lane % 4);
    put(in.a[0], a[g][k], a[g][k + 1]);
    put(in.a[1], a[g + 8][k], a[g + 8][k + 1]);
    put(in.a[2], a[g][k + 8], a[g][k + 9]);
    put(in.a[3], a[g + 8][k + 8], a[g + 8][k + 9]);
    put(in.b0, b[k][g], b[k + 1][g]);
    put(in.b1, b[k + 8][g], b[k + 9][g]);
    memcpy(&c[g][k], sums, 2 * sizeof(float));
    memcpy(&c[g + 8][k], sums + 2, 2 * sizeof(float));
  }
  Row columns[16];
  memcpy(columns, b, sizeof(b));
  for (int i = 0; i < 16; ++i) {
    Row sum;
    memcpy(&sum, c[i], sizeof(sum));
    for (int k = 0; k < 16; ++k) sum += a[i][k] * columns[k];
    memcpy(c[i], &sum, sizeof(sum));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* sums = static_cast<float*>(lanes[lane].out);
    memcpy(sums, &c[lane / 4][2 * (lane % 4)], 2 * sizeof(float));
    memcpy(sums + 2, &c[lane / 4 + 8][2 * (lane % 4)], 2 * sizeof(float));
  }
}

}  // namespace

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kSyncWarp:
      return "__syncwarp";
    case Operation::kShuffle:
      return "shuffle_xor";
    case Operation::kLoadMatrices:
      return "load_matrices";
    case Operation::kLoadMatricesTransposed:
      return "load_matrices_transposed";
    case Operation::kMultiplyAddHalf:
      return "multiply_add<Half>";
    case Operation::kMultiplyAddBFloat16:
      return "multiply_add<BFloat16>";
  }
  return "an unknown operation";
}

std::string execute(Operation operation, const LaneOperands (&lanes)[kLanes], int warp,
                    int64_t interval, SharedMemory& memory, Counters& counters) {
  switch (operation) {
    case Operation::kSyncWarp:
      break;
    case Operation::kShuffle:
      ++counters.shuffles;
      return shuffle(lanes);
    case Operation::kLoadMatrices:
      return load(lanes, false, warp, interval, memory, counters);
    case Operation::kLoadMatricesTransposed:
      return load(lanes, true, warp, interval, memory, counters);
    case Operation::kMultiplyAddHalf:
      ++counters.multiply_adds;
      multiply_add_fragments<half_to_float>(lanes);
      break;
    case Operation::kMultiplyAddBFloat16:
      ++counters.multiply_adds;
      multiply_add_fragments<bfloat16_to_float>(lanes);
      break;
  }
  return "";
}

}  // namespace emulator
}  // namespace sta
