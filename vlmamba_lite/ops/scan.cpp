// The selective scan, fused: forward and backward of one loop, for a CPU.
//
// The same three steps in the same order as `ops/chunked.py`, whose layout and equations these comments use: a
// chunk of T steps at a time, the state in front of each chunk kept in `bounds`, the states of a chunk computed
// again in the backward. A processor computes with many numbers at once: 16 floats in a register of 512 bits,
// or in two of 256. They are 16 *channels*: these do the same things with different numbers and never need each
// other. Python hands over a `Scan` (see `ops/cpp.py`), and each worker takes one row, one group and a share of
// its blocks of 16 channels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int W = 16;                       // channels side by side: floats in a 512-bit register

// The one costly thing is the exponential. The library's `expf` works on one number at a time; this one is
// multiplications and additions only, for arguments that are never positive: e^x = 2^k e^r with k the whole
// number nearest to x / ln 2. For |r| <= ln(2) / 2 a polynomial of degree 7 errs by less than the spacing of
// floats.
inline double decay(double x) { return std::exp(x); }
inline float decay(float x) {                               // e^x as 2^k e^r, with a whole k and |r| <= ln(2) / 2
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;            // beyond, float32 has no normal numbers
    const float z = x * 1.44269504f + 12582912.f, k = z - 12582912.f;     // adding 1.5 * 2^23 rounds to a whole number
    const float r = x - k * 0.693359375f + k * 2.12194440e-4f;            // ln(2) in two parts
    float p = 1.9875691e-4f;                                // e^r = 1 + r + r^2 p(r)
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    int32_t bits;
    std::memcpy(&bits, &z, 4);
    bits = (bits + 127) << 23;                              // k, moved to where a float keeps its exponent
    float power;
    std::memcpy(&power, &bits, 4);
    return (p * r * r + r + 1.f) * power;
}

// A scan's tensors and sizes, as Python hands them over. R rows, G groups of P channels, N states, chunks of T
// steps.
template <class F> struct Scan {
    const F *u, *dt, *A, *B, *C, *D;        // (R, G P, L) twice, (G, N, P), (L, R, G, N) or (G, N, P) twice, (G P)
    F *h, *y, *bounds;                      // (R, G, N, P), as u, (L / T, R, G, N, P)
    const F *gy;                            // the gradient of y; then the gradients that are asked for, of
    F *gu, *gdt, *gA, *gB, *gC, *gD;        // u, dt, A (R, G, N, P), B, C (parts, L, R, G, N) or (R, G, N, P),
                                            // D (R, G P)
    int64_t L, R, G, N, P, T, parts;
    int64_t row, channel, step;             // strides of u, dt, y and their gradients
    int64_t kb, kc, threads;                // whether B and C are constant
};

// One row, one group, a share of its blocks of 16 channels. KB and KC say whether B and C are constant: the
// compiler makes a version for each case, without a test inside the loop.
template <class F, bool KB, bool KC> struct Worker {
    const Scan<F> s;
    const int64_t N, P, T;
    int64_t b, g, part;                     // row, group, share of the channels
    int64_t t0, steps, k, w;                // first step and length of the chunk; block of channels and its width
    std::vector<F> u, dt, o, y, gdt;        // (T, W)
    std::vector<F> h, a;                    // (T + 1, N, W), (T, N, W)
    std::vector<F> A, B, C, gh, gA;         // (N, W)
    std::vector<F> gB, gC;                  // (T, N, W), or (N, W) for a constant one

    Worker(const Scan<F>& s, int64_t b, int64_t g, int64_t part)
        : s(s), N(s.N), P(s.P), T(s.T), b(b), g(g), part(part), u(T * W), dt(T * W), o(T * W), y(T * W), gdt(T * W),
          h((T + 1) * N * W), a(T * N * W), A(N * W), B(N * W), C(N * W), gh(N * W), gA(N * W),
          gB((KB ? 1 : T) * N * W), gC((KC ? 1 : T) * N * W) {}

    // Where things lie: offsets of a step's matrix in (L, R, G, N), of the block in (R, G, N, P), in (G, N, P)
    // and in (R, G P, L).
    int64_t matrix(int64_t t) const { return (((t0 + t) * s.R + b) * s.G + g) * N; }
    int64_t state() const { return (b * s.G + g) * N * P + k * W; }
    int64_t own() const { return g * N * P + k * W; }
    int64_t corner() const { return b * s.row + (g * P + k * W) * s.channel + t0 * s.step; }

    // u, dt and y stay in the order the caller has them: a block reads its steps of a chunk into a tile,
    // channels side by side, and writes them back from one. A block at the end of a group may have fewer than
    // 16 channels: the missing ones are zeros, and are never written back.
    void tile(std::vector<F>& to, const F* from) const {
        for (int l = 0; l < W; l++)
            for (int64_t t = 0; t < steps; t++)
                to[t * W + l] = l < w ? from[corner() + l * s.channel + t * s.step] : F(0);
    }
    void untile(F* to, const std::vector<F>& from) const {
        for (int l = 0; l < w; l++)
            for (int64_t t = 0; t < steps; t++) to[corner() + l * s.channel + t * s.step] = from[t * W + l];
    }

    void load(F* to, const F* from) const {
        for (int l = 0; l < W; l++) to[l] = l < w ? from[l] : F(0);
    }
    void load_all(std::vector<F>& to, const F* from) const {
        for (int64_t n = 0; n < N; n++) load(&to[n * W], from + n * P);
    }
    void store_all(F* to, const F* from) const {
        for (int64_t n = 0; n < N; n++) std::copy(from + n * W, from + n * W + w, to + n * P);
    }

    template <bool K> static F pick(const F* X, int64_t n, int l) { return K ? X[n * W + l] : X[n]; } // constant or not
    const F* B_at(int64_t t) const { return KB ? B.data() : s.B + matrix(t); }
    const F* C_at(int64_t t) const { return KC ? C.data() : s.C + matrix(t); }
    F* gB_at(int64_t t) { return &gB[KB ? 0 : t * N * W]; }
    F* gC_at(int64_t t) { return &gC[KC ? 0 : t * N * W]; }

    // All states and decays of a block in a chunk, from its first state: `_decay_and_input` and `_recur` in
    // one.
    void states(const F* start) {
        load_all(h, start);
        load_all(A, s.A + own());
        if (KB) load_all(B, s.B + own());
        if (KC) load_all(C, s.C + own());
        tile(u, s.u);
        tile(dt, s.dt);
        for (int64_t t = 0; t < steps; t++) {
            const F *At = &A[0], *Bt = B_at(t), *d = &dt[t * W], *x = &u[t * W];
            F *ht = &h[t * N * W], *at = &a[t * N * W];
            for (int64_t n = 0; n < N; n++)
                #pragma omp simd
                for (int l = 0; l < W; l++) {
                    at[n * W + l] = decay(d[l] * At[n * W + l]);
                    ht[(N + n) * W + l] = at[n * W + l] * ht[n * W + l] + pick<KB>(Bt, n, l) * (d[l] * x[l]);
                }
        }
    }

    // The output y of a block in a chunk, with the skip D u.
    void read() {
        F D[W];
        load(D, s.D + g * P + k * W);
        for (int64_t t = 0; t < steps; t++) {
            F sum[W];
            const F *ht = &h[(t + 1) * N * W], *Ct = C_at(t), *x = &u[t * W];
            for (int l = 0; l < W; l++) sum[l] = D[l] * x[l];
            for (int64_t n = 0; n < N; n++)
                #pragma omp simd
                for (int l = 0; l < W; l++) sum[l] += pick<KC>(Ct, n, l) * ht[n * W + l];
            std::copy(sum, sum + W, &y[t * W]);
        }
        untile(s.y, y);
    }

    // This worker's blocks of channels; neighbours go to different workers.
    template <class Body> void blocks(Body body) {
        for (k = part; k * W < P; k += s.parts) {
            w = std::min<int64_t>(W, P - k * W);
            body();
        }
    }

    // All chunks from left to right. s.h holds the running state of every channel.
    void forward() {
        for (t0 = 0; t0 < s.L; t0 += T) blocks([&] {
            steps = std::min(T, s.L - t0);
            F *now = s.h + state(), *bound = s.bounds + t0 / T * s.R * s.G * N * P + state();
            states(now);
            store_all(bound, &h[0]);
            store_all(now, &h[steps * N * W]);
            read();
        });
    }

    // The gradients of one step in the three steps of chunked.py, first for its states. In gh lies a_{t+1}
    // gh_{t+1}, the `carry` from the right; step 1 makes gh_t of it, here `now`, and a_t gh_t remains for the
    // step on the left.
    void reverse_states(int64_t t, const F* v, const F* gy, F* gdA, F* gv) {
        const F *Bt = B_at(t), *Ct = C_at(t), *At = &A[0], *at = &a[t * N * W], *d = &dt[t * W];
        const F *before = &h[t * N * W], *after = &h[(t + 1) * N * W];
        F *ght = &gh[0], *gAt = &gA[0], *gBt = gB_at(t), *gCt = gC_at(t);
        F sum_A[W] = {}, sum_v[W] = {};
        for (int64_t n = 0; n < N; n++)
            #pragma omp simd
            for (int l = 0; l < W; l++) {
                const int64_t i = n * W + l;
                const F now = ght[i] + pick<KC>(Ct, n, l) * gy[l];            // step 1: the state's gradient
                gCt[i] += after[i] * gy[l];                         // step 2: the factors of the state and of the input
                gBt[i] += now * v[l];
                sum_v[l] += pick<KB>(Bt, n, l) * now;
                ght[i] = at[i] * now;
                const F q = ght[i] * before[i];                               // step 3: the exponent
                sum_A[l] += q * At[i];
                gAt[i] += q * d[l];
            }
        std::copy(sum_A, sum_A + W, gdA);
        std::copy(sum_v, sum_v + W, gv);
    }

    // Then for the token: v = dt u is in both gdt and gu, and the skip D u in gu and gD.
    void reverse_step(int64_t t, const F* D, F* gD) {
        F v[W], gdA[W], gv[W];
        const F *d = &dt[t * W], *x = &u[t * W], *gy = &o[t * W];
        for (int l = 0; l < W; l++) v[l] = d[l] * x[l];
        reverse_states(t, v, gy, gdA, gv);
        for (int l = 0; l < W; l++) {
            gdt[t * W + l] = gdA[l] + gv[l] * x[l];
            y[t * W + l] = gv[l] * d[l] + D[l] * gy[l];     // the buffer y, free now, takes the gradient of u
            gD[l] += gy[l] * x[l];
        }
    }

    void add(F* to, const std::vector<F>& sums) const {
        for (int64_t n = 0; n < N; n++)
            for (int l = 0; l < w; l++) to[state() + n * P + l] += sums[n * W + l];
    }

    // A block's gradients in a chunk, from right to left: fetch the sums so far, walk, put everything back.
    void reverse() {
        load_all(gh, s.h + state());                        // s.h holds the gradient that comes from the right
        std::fill(gA.begin(), gA.end(), F(0));              // sums of the chunks' sums round less than long ones
        if (KB) std::fill(gB.begin(), gB.end(), F(0));
        if (KC) std::fill(gC.begin(), gC.end(), F(0));
        F D[W], gD[W] = {}, *gD_here = s.gD + (b * s.G + g) * P + k * W;
        load(D, s.D + g * P + k * W);
        tile(o, s.gy);
        for (int64_t t = steps - 1; t >= 0; t--) reverse_step(t, D, gD);
        untile(s.gu, y);
        untile(s.gdt, gdt);
        for (int l = 0; l < w; l++) gD_here[l] += gD[l];
        store_all(s.h + state(), &gh[0]);
        add(s.gA, gA);
        if (KB) add(s.gB, gB);
        if (KC) add(s.gC, gC);
    }

    // The gradients of B and C are sums over channels. Each lane adds up its own through all blocks; the lanes
    // meet here, at the end of a chunk. Python adds up the workers, always in the same order, so that the
    // result does not depend on which thread was first.
    void collect(F* to, const F* sums) const {
        to += part * s.L * s.R * s.G * N;
        for (int64_t t = 0; t < steps; t++)
            for (int64_t n = 0; n < N; n++) {
                F sum = 0;
                for (int l = 0; l < W; l++) sum += sums[(t * N + n) * W + l];
                to[matrix(t) + n] = sum;
            }
    }

    // All chunks from right to left.
    void backward() {
        for (t0 = (s.L - 1) / T * T; t0 >= 0; t0 -= T) {
            steps = std::min(T, s.L - t0);
            std::fill(gB.begin(), gB.end(), F(0));
            std::fill(gC.begin(), gC.end(), F(0));
            blocks([&] { states(s.bounds + t0 / T * s.R * s.G * N * P + state()); reverse(); });
            if (!KB) collect(s.gB, &gB[0]);
            if (!KC) collect(s.gC, &gC[0]);
        }
    }
};

// A worker for each row, group and part, spread over the threads.
template <class F, bool KB, bool KC> void each(const Scan<F>& s) {
    #pragma omp parallel for collapse(3) num_threads(s.threads)
    for (int64_t b = 0; b < s.R; b++)
        for (int64_t g = 0; g < s.G; g++)
            for (int64_t part = 0; part < s.parts; part++) {
                Worker<F, KB, KC> worker(s, b, g, part);
                s.gy ? worker.backward() : worker.forward();
            }
}

template <class F> void scan(const Scan<F>& s) {
    if (s.kb) (s.kc ? each<F, true, true> : each<F, true, false>)(s);
    else (s.kc ? each<F, false, true> : each<F, false, false>)(s);
}

// The two entries for Python.
extern "C" void scan_float32(const Scan<float>* s) { scan(*s); }
extern "C" void scan_float64(const Scan<double>* s) { scan(*s); }
