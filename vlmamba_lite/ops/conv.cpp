// The causal convolution with its SiLU, fused: forward and backward, for a CPU.
//
// Channels lie side by side in memory, so that a processor takes 16 of them at once, and a step needs only the K
// inputs that end at it. `seen` has K inputs in front of the first one, of which the first is not used. A worker
// takes one row and a block of channels; in the backward it makes the output before SiLU once more.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// A convolution's tensors and sizes, as Python hands them over (see `layers/mamba.py`). R rows, D channels.
template <class F> struct Conv {
    const F *seen, *taps, *bias;            // (R, K + L, D), (K, D), (D) or nothing
    F *y;                                   // (R, L, D)
    const F *gy;                            // as y; then the gradients of seen, taps (R, K, D), bias (R, D)
    F *gseen, *gtaps, *gbias;
    int64_t L, R, D, K, silu, threads;
};

constexpr int64_t BLOCK = 64;               // channels of a worker: a few registers of each tap

// 1 / (1 + e^-x), from an exponential of arguments that are never positive.
template <class F> inline F sigmoid(F x) {
    const F e = decay(x < 0 ? x : -x);
    return (x < 0 ? e : F(1)) / (F(1) + e);
}

// The sums of a block's channels in one step, before SiLU.
template <class F> inline void sums(const Conv<F>& c, const F* seen, int64_t d, int64_t w, F* v) {
    for (int64_t l = 0; l < w; l++) v[l] = c.bias ? c.bias[d + l] : F(0);
    for (int64_t k = 0; k < c.K; k++) {
        const F *x = seen + (k + 1) * c.D, *tap = c.taps + k * c.D + d;
        #pragma omp simd
        for (int64_t l = 0; l < w; l++) v[l] += x[l] * tap[l];
    }
}

template <class F> void convolve(const Conv<F>& c, int64_t b, int64_t d, int64_t w) {
    F v[BLOCK];
    for (int64_t t = 0; t < c.L; t++) {
        F* y = c.y + (b * c.L + t) * c.D + d;
        sums(c, c.seen + (b * (c.K + c.L) + t) * c.D + d, d, w, v);
        #pragma omp simd
        for (int64_t l = 0; l < w; l++) y[l] = c.silu ? v[l] * sigmoid(v[l]) : v[l];
    }
}

// Each output hands its gradient back along its taps, and each tap collects the products with what it saw.
template <class F> void convolve_back(const Conv<F>& c, int64_t b, int64_t d, int64_t w) {
    F v[BLOCK], g[BLOCK], ones[BLOCK];
    std::vector<F> sum((c.K + 1) * BLOCK), total((c.K + 1) * BLOCK);    // of the taps, then of the bias
    std::fill_n(ones, BLOCK, F(1));
    for (int64_t t = 0; t < c.K; t++) std::fill_n(c.gseen + (b * (c.K + c.L) + t) * c.D + d, w, F(0));
    for (int64_t t = 0; t < c.L; t++) {
        const int64_t row = (b * (c.K + c.L) + t) * c.D + d;
        const F* gy = c.gy + (b * c.L + t) * c.D + d;
        std::fill_n(c.gseen + row + c.K * c.D, w, F(0));
        if (c.silu) sums(c, c.seen + row, d, w, v);
        #pragma omp simd
        for (int64_t l = 0; l < w; l++) {
            const F s = c.silu ? sigmoid(v[l]) : F(1);
            g[l] = c.silu ? gy[l] * s * (F(1) + v[l] * (F(1) - s)) : gy[l];
        }
        for (int64_t k = 0; k <= c.K; k++) {
            const bool tap = k < c.K;                                   // or the bias, which sees a one
            const F *x = tap ? c.seen + row + (k + 1) * c.D : ones, *w_k = c.taps + k * c.D + d;
            F *gx = c.gseen + row + (k + 1) * c.D, *s = &sum[k * BLOCK];
            #pragma omp simd
            for (int64_t l = 0; l < w; l++) s[l] += g[l] * x[l];
            if (!tap) continue;
            #pragma omp simd
            for (int64_t l = 0; l < w; l++) gx[l] += g[l] * w_k[l];
        }
        if (t % 32 == 31 || t == c.L - 1)                               // sums of sums round less than long ones
            for (size_t i = 0; i < sum.size(); i++) {
                total[i] += sum[i];
                sum[i] = 0;
            }
    }
    for (int64_t k = 0; k < c.K; k++) std::copy_n(&total[k * BLOCK], w, c.gtaps + (b * c.K + k) * c.D + d);
    std::copy_n(&total[c.K * BLOCK], w, c.gbias + b * c.D + d);
}

template <class F> void conv(const Conv<F>& c) {
    #pragma omp parallel for collapse(2) num_threads(c.threads)
    for (int64_t b = 0; b < c.R; b++)
        for (int64_t d = 0; d < c.D; d += BLOCK)
            (c.gy ? convolve_back<F> : convolve<F>)(c, b, d, std::min(BLOCK, c.D - d));
}

extern "C" void conv_float32(const Conv<float>* c) { conv(*c); }
extern "C" void conv_float64(const Conv<double>* c) { conv(*c); }
