#include "ggml-row-attention.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int      kLanes    = 16;
constexpr int      kCells    = 64;          // cells of K or V unpacked at a time
constexpr int      kStep     = 4;           // rows of a product that a kernel keeps in registers
constexpr uint16_t kClosed   = 0xFC00;      // -infinity in f16
constexpr uint32_t kInfinity = 0x7F800000;  // in f32

#if defined(__AVX512F__)
constexpr int kVectors = 2;
#else
constexpr int kVectors = 1;
#endif
constexpr int kRows = kLanes*kVectors;     // query rows per block, one per lane

typedef float   floats __attribute__((vector_size(kLanes*sizeof(float)), may_alias));
typedef int32_t ints   __attribute__((vector_size(kLanes*sizeof(int32_t)), may_alias));

struct Block {
    floats v[kVectors];
};

floats splat(float x) {
    return floats{} + x;
}

// e^x of each lane, for x <= 0; exactly 0 for -infinity. Cephes' polynomial, 2 ulp.
floats exp_of(floats x) {
    const floats magic = splat(12582912.0f);  // 1.5*2^23: adding it rounds to an integer
    const floats low   = splat(-87.0f);
    const floats y     = x > low ? x : low;
    const floats n     = (y*1.44269504f + magic) - magic;
    const floats r     = (y - n*0.693359375f) + n*2.12194440e-4f;

    floats p = splat(1.9875691500e-4f);
    p = p*r + 1.3981999507e-3f;
    p = p*r + 8.3334519073e-3f;
    p = p*r + 4.1665795894e-2f;
    p = p*r + 1.6666665459e-1f;
    p = p*r + 5.0000001201e-1f;
    p = p*(r*r) + r + 1.0f;

    const ints   bits  = (__builtin_convertvector(n, ints) + 127) << 23;
    const floats power = (floats) bits;
    return x > low ? p*power : floats{};
}

// c[m] += sum over k of a[m*am + k*ak]*b[k], k ascending, for kStep rows m, separately in each lane.
void multiply(Block * c, const float * a, int64_t am, int64_t ak, const Block * b, int64_t n) {
    Block sum[kStep];
    for (int m = 0; m < kStep; ++m) {
        sum[m] = c[m];
    }
    for (int64_t k = 0; k < n; ++k) {
        const Block row = b[k];
#pragma GCC unroll 4
        for (int m = 0; m < kStep; ++m) {
            const float factor = a[m*am + k*ak];
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; ++i) {
                sum[m].v[i] += row.v[i]*factor;
            }
        }
    }
    for (int m = 0; m < kStep; ++m) {
        c[m] = sum[m];
    }
}

// Scratch memory of a thread, reused between calls.
struct Scratch {
    std::vector<uint32_t> open;      // [n_kv] bit mask of the block's queries that see the cell
    std::vector<int32_t>  cells;     // cells that any query sees
    std::vector<Block>    query;     // [DK]
    std::vector<Block>    weight;    // [cells] scores, then their exponentials
    std::vector<Block>    out;       // [DV]
    std::vector<float>    unpacked;  // [kCells][DK or DV]
};

class Attention {
public:
    Attention(ggml_tensor * node, Scratch & scratch)
        : node(node), q(node->src[0]), k(node->src[1]), v(node->src[2]), mask(node->src[3]), sinks(node->src[4]), s(scratch),
          n_queries(q->ne[1]), n_kv(k->ne[1]), n_group(q->ne[2]/k->ne[2]) {
        std::memcpy(&scale,    (const float *) node->op_params + 0, sizeof(float));
        std::memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(float));
        std::memcpy(&cap,      (const float *) node->op_params + 2, sizeof(float));
        if (cap != 0.0f) {
            scale /= cap;
        }
        s.query.resize(q->ne[0]);
        s.out.resize(v->ne[0]);
        s.unpacked.resize(kCells*std::max(q->ne[0], v->ne[0]));
        s.open.resize(n_kv);
        s.cells.resize(n_kv + kStep);
    }

    // A row is a query of one of the heads that share KV head `head`.
    int64_t n_rows() const { return n_queries*n_group; }

    void attend(int64_t head, int64_t first, int64_t last) {
        find_cells(first, last);
        load_queries(head, first, last);
        if (score(head, first, last)) {
            store(head, first, last);
            return;
        }
        // otherwise zero times infinity would spread another row's overflow
        for (int64_t row = first; last - first > 1 && row < last; ++row) {
            attend(head, row, row + 1);
        }
        if (last - first == 1) {
            store(head, first, last);
        }
    }

private:
    int64_t query_of(int64_t row) const { return row/n_group; }
    int64_t head_of(int64_t head, int64_t row) const { return head*n_group + row%n_group; }

    const uint16_t * mask_of(int64_t row) const { return (const uint16_t *) ((const char *) mask->data + query_of(row)*mask->nb[1]); }

    // ALiBi (Press et al. 2022): the slope by which a head's scores fall per position of distance
    float slope_of(int64_t head) const {
        const uint32_t n_head = (uint32_t) q->ne[2];
        const uint32_t n_low  = 1u << (uint32_t) std::floor(std::log2(n_head));
        return head < n_low ? std::pow(2.0f, -max_bias/n_low*(head + 1)) : std::pow(2.0f, -max_bias/2.0f/n_low*(2*(head - n_low) + 1));
    }

    void find_cells(int64_t first, int64_t last) {
        std::fill(s.open.begin(), s.open.end(), 0);
        for (int64_t i = query_of(first); i <= query_of(last - 1); ++i) {
            const auto   * row = (const uint16_t *) ((const char *) mask->data + i*mask->nb[1]);
            const uint32_t bit = 1u << (i - query_of(first));
            for (int64_t c = 0; c < n_kv; ++c) {
                s.open[c] |= row[c] != kClosed ? bit : 0;
            }
        }
        n_cells = 0;
        for (int64_t c = 0; c < n_kv; ++c) {
            s.cells[n_cells] = (int32_t) c;
            n_cells += s.open[c] != 0;
        }
        s.weight.resize(std::max<size_t>(s.weight.size(), n_cells + kStep));
    }

    void load_queries(int64_t head, int64_t first, int64_t last) {
        std::fill(s.query.begin(), s.query.end(), Block{});
        for (int64_t row = first; row < last; ++row) {
            const auto * from = (const float *) ((const char *) q->data + query_of(row)*q->nb[1] + head_of(head, row)*q->nb[2]);
            auto       * to   = (float *) s.query.data() + (row - first);
            for (int64_t d = 0; d < q->ne[0]; ++d) {
                to[d*kRows] = from[d]*scale;
            }
        }
    }

    // Unpacks n listed cells of K or V to consecutive f32 rows, padded with zeros to a multiple of kStep.
    void unpack(const ggml_tensor * t, int64_t head, int64_t begin, int64_t n) {
        const int64_t size = t->ne[0];
        for (int64_t j = 0; j < n; ++j) {
            const char * from = (const char *) t->data + s.cells[begin + j]*t->nb[1] + head*t->nb[2];
            float      * to   = s.unpacked.data() + j*size;
            if (t->type == GGML_TYPE_F16) {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) from, to, size);
            } else if (t->type == GGML_TYPE_F32) {
                std::memcpy(to, from, size*sizeof(float));
            } else {
                ggml_get_type_traits(t->type)->to_float(from, to, size);
            }
        }
        std::fill_n(s.unpacked.begin() + n*size, (GGML_PAD(n, kStep) - n)*size, 0.0f);
    }

    bool unpacked_is_finite(int64_t n) const {
        uint32_t largest = 0;  // largest absolute value, as bits
        for (int64_t i = 0; i < n; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &s.unpacked[i], sizeof(bits));
            largest = std::max(largest, bits & 0x7FFFFFFFu);
        }
        return largest < kInfinity;
    }

    // False if a row must not be computed together with others.
    bool score(int64_t head, int64_t first, int64_t last) {
        const int64_t dk = q->ne[0];
        const int64_t dv = v->ne[0];

        ints shift[kVectors];
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = std::min(first + r, last - 1);
            shift[r/kLanes][r%kLanes] = (int32_t) (query_of(row) - query_of(first));
        }

        float slope[kRows];
        for (int64_t row = first; row < last; ++row) {
            slope[row - first] = max_bias > 0.0f ? slope_of(head_of(head, row)) : 0.0f;
        }

        Block top;
        for (auto & t : top.v) {
            t = splat(-INFINITY);
        }
        for (int64_t begin = 0; begin < n_cells; begin += kCells) {
            const int64_t n = std::min<int64_t>(kCells, n_cells - begin);
            unpack(k, head, begin, n);
            for (int64_t j = 0; j < n; j += kStep) {
                Block * w = s.weight.data() + begin + j;
                std::fill_n(w, kStep, Block{});
                multiply(w, s.unpacked.data() + j*dk, dk, 1, s.query.data(), dk);
            }
            for (int64_t j = 0; j < n; ++j) {
                Block   & w    = s.weight[begin + j];
                const int open = (int) s.open[s.cells[begin + j]];
                if (cap != 0.0f) {
                    for (int r = 0; r < kRows; ++r) {
                        w.v[r/kLanes][r%kLanes] = cap*tanhf(w.v[r/kLanes][r%kLanes]);
                    }
                }
                if (max_bias > 0.0f) {  // the mask is minus the distance
                    for (int64_t row = first; row < last; ++row) {
                        const int r = (int) (row - first);
                        w.v[r/kLanes][r%kLanes] += slope[r]*ggml_fp16_to_fp32(mask_of(row)[s.cells[begin + j]]);
                    }
                }
                for (int i = 0; i < kVectors; ++i) {
                    const ints sees = ((ints{} + open) >> shift[i]) & 1;
                    w.v[i]   = sees != 0 ? w.v[i] : splat(-INFINITY);
                    top.v[i] = w.v[i] > top.v[i] ? w.v[i] : top.v[i];
                }
            }
        }

        std::fill(s.out.begin(), s.out.end(), Block{});
        sum = {};
        if (sinks != nullptr) {  // attention sinks: a score per head whose weight is discarded
            Block sink = top;
            for (int64_t row = first; row < last; ++row) {
                const int r = (int) (row - first);
                sink.v[r/kLanes][r%kLanes] = ((const float *) sinks->data)[head_of(head, row)];
            }
            for (int i = 0; i < kVectors; ++i) {
                top.v[i] = sink.v[i] > top.v[i] ? sink.v[i] : top.v[i];
                sum.v[i] = exp_of(sink.v[i] - top.v[i]);
            }
        }
        for (int64_t c = 0; c < n_cells; ++c) {
            for (int i = 0; i < kVectors; ++i) {
                const floats p = exp_of(s.weight[c].v[i] - top.v[i]);
                s.weight[c].v[i] = p;
                sum.v[i] += p;
            }
        }
        for (int64_t begin = 0; begin < n_cells; begin += kCells) {
            const int64_t n = std::min<int64_t>(kCells, n_cells - begin);
            unpack(v, head, begin, n);
            if (last - first > 1 && !unpacked_is_finite(n*dv)) {
                return false;
            }
            for (int64_t d = 0; d < dv; d += kStep) {
                multiply(s.out.data() + d, s.unpacked.data() + d, 1, dv, s.weight.data() + begin, n);
            }
        }
        return true;
    }

    void store(int64_t head, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const auto  * from  = (const float *) s.out.data() + (row - first);
            const float   total = ((const float *) &sum)[row - first];
            const float   part  = total == 0.0f ? 0.0f : 1.0f/total;
            auto        * to    = (float *) ((char *) node->data + head_of(head, row)*node->nb[1] + query_of(row)*node->nb[2]);
            for (int64_t d = 0; d < v->ne[0]; ++d) {
                to[d] = from[d*kRows]*part;
            }
        }
    }

    ggml_tensor       * const node;
    const ggml_tensor * const q;
    const ggml_tensor * const k;
    const ggml_tensor * const v;
    const ggml_tensor * const mask;
    const ggml_tensor * const sinks;  // F32 [n_head], or null
    Scratch & s;

    const int64_t n_queries, n_kv, n_group;
    int64_t n_cells = 0;
    float   scale   = 1.0f;
    float   cap     = 0.0f;  // logit soft-capping
    float   max_bias = 0.0f; // ALiBi
    Block   sum     = {};
};

bool is_possible(const ggml_tensor * node) {
    const ggml_tensor * q    = node->src[0];
    const ggml_tensor * k    = node->src[1];
    const ggml_tensor * v    = node->src[2];
    const ggml_tensor * mask = node->src[3];

    return mask != nullptr && mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->ne[3] == 1 &&
        q->type == GGML_TYPE_F32 && q->ne[3] == 1 && k->ne[3] == 1 && v->ne[3] == 1 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && v->ne[0] % kStep == 0;
}

} // namespace

bool ggml_row_attention(const ggml_compute_params * params, ggml_tensor * node) {
    if (node->op_params[GGML_ROW_ATTENTION_PARAM] == 0 || params->use_ref || !is_possible(node)) {
        return false;
    }

    static thread_local Scratch scratch;
    Attention attention(node, scratch);

    const int64_t n_heads  = node->src[1]->ne[2];
    const int64_t n_blocks = (attention.n_rows() + kRows - 1)/kRows;

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t unit = params->ith; unit < n_blocks*n_heads; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t first = unit/n_heads*kRows;
        attention.attend(unit%n_heads, first, std::min(first + kRows, attention.n_rows()));
    }
    return true;
}
