// SSD in chunks, fused: forward and backward, for a CPU. The steps and letters are those of `naive_ssd` in chapter 04.
//
// A worker takes one row, one group and a share of its heads, and walks over the chunks: forward from left to right
// with the state of each of its heads, backward from right to left with the state's gradient. So a call is one large
// piece of work for each thread. Nearly all of it is products of small matrices (`product`), which lie in the first
// caches; rows of a tile are padded with zeros to whole registers. Tiles are transposed (YT, XT, ...) where the
// product needs its columns side by side. dt is inside: X = dt x, a = dt A, and the skip D x is added.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64;                   // of a register
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class F> struct Register {
    typedef F type __attribute__((vector_size(BYTES)));
    static constexpr int64_t width = BYTES / sizeof(F);
};

// C (rows, V registers) = or += A B over K, for a block that stays in registers. A is read one number at a time, so its
// strides are free; B and C have their columns side by side.
template <class F, int rows, int V>
inline void block(int64_t K, const F* A, int64_t ar, int64_t ak, const F* B, int64_t bk, F* C, int64_t cr, bool add) {
    typedef typename Register<F>::type reg;
    constexpr int64_t W = Register<F>::width;
    reg sum[rows][V] = {};
    for (int64_t k = 0; k < K; k++) {
        reg b[V];
        for (int v = 0; v < V; v++) std::memcpy(&b[v], B + k * bk + v * W, BYTES);
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < V; v++) sum[m][v] += A[m * ar + k * ak] * b[v];
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < V; v++) {
            reg c;
            if (add) {
                std::memcpy(&c, C + m * cr + v * W, BYTES);
                sum[m][v] += c;
            }
            std::memcpy(C + m * cr + v * W, &sum[m][v], BYTES);
        }
}

// Which part of a product is needed where one of its matrices is a triangle: all of it; only rows or only terms k that
// are not beyond the columns at hand (upper triangles); or not before them (lower ones).
enum Part { ALL, ROWS_UPTO, TERMS_UPTO, ROWS_FROM, TERMS_FROM };

// C (M, N) = or += A B over K in such blocks; N is a whole number of registers.
template <class F>
__attribute__((noinline)) void product(int64_t M, int64_t N, int64_t K, const F* A, int64_t ar, int64_t ak,
                                       const F* B, int64_t bk, F* C, int64_t cr, bool add = false, Part part = ALL) {
    constexpr int64_t W = Register<F>::width;
    constexpr int rows = 6;
    for (int64_t n = 0, wide; n < N; n += wide) {
        wide = std::min(2 * W, N - n);
        const int64_t end = n + wide;
        const int64_t from = part == ROWS_FROM ? std::min(n, M) : 0, upto = part == ROWS_UPTO ? std::min(end, M) : M;
        const int64_t k = part == TERMS_FROM ? std::min(n, K) : 0, terms = (part == TERMS_UPTO ? std::min(end, K) : K) - k;
        int64_t m = from;
        const auto run = [&](auto kernel, int64_t step) {
            for (; m + step <= upto; m += step)
                kernel(terms, A + m * ar + k * ak, ar, ak, B + k * bk + n, bk, C + m * cr + n, cr, add);
        };
        if (wide == 2 * W) run(block<F, rows, 2>, rows), run(block<F, 3, 2>, 3), run(block<F, 1, 2>, 1);
        else run(block<F, rows, 1>, rows), run(block<F, 3, 1>, 3), run(block<F, 1, 1>, 1);
    }
}

// SSD's tensors and sizes, as Python hands them over (see `ops/ssd.py`). R rows, H heads of P channels in G groups,
// N states, chunks of at most Q steps.
template <class F> struct Ssd {
    const F *x, *dt, *A, *B, *C, *D;        // (R, L, H, P), (R, L, H), (H), (R, L, G, N) twice, (H, P)
    F *h, *y, *bounds;                      // (R, H, P, N), as x, (chunks, R, H, P, N)
    const F* gy;                            // the gradient of y; then the gradients that are asked for, of
    F *gx, *gdt, *gA, *gB, *gC, *gD;        // x, dt, A (R, H), B, C (parts, R, L, G, N), D (R, H, P)
    int64_t L, R, H, G, P, N, Q, parts;
    int64_t xr, xt, br, bt, cr, ct;         // strides of rows and steps of x, B and C; all else is contiguous
    int64_t threads;
};

template <class F> struct Heads {
    const Ssd<F>& s;
    const int64_t b, g, part, P, N, Q, PN;
    static constexpr int64_t W = Register<F>::width;
    const int64_t Qp, Np;                   // Q and N in whole registers
    int64_t t0, q, head;                    // first step and length of the chunk; head
    std::vector<F> states;                  // (heads, P, Np): running states, or their gradients
    std::vector<F> B, C, BT, CT;            // (Q, Np) twice, (N, Qp) twice
    std::vector<F> S, M, gM, gS;            // (Q, Qp): scores, the masked matrix, gradients; in the forward S, M transposed
    std::vector<F> XT, YT;                  // (P, Qp)
    std::vector<F> X, E, gB, gC, part_C;    // (Q, P) twice, (Q, Np)
    std::vector<F> h0;                      // (P, Np)
    std::vector<F> high, low, dt, since, left, left_dt, rows, columns;            // (Qp)
    std::vector<double> gs;                 // (Q), the gradient of the running sums
    F kept;

    Heads(const Ssd<F>& s, int64_t b, int64_t g, int64_t part)
        : s(s), b(b), g(g), part(part), P(s.P), N(s.N), Q(s.Q), PN(s.P * s.N), Qp((s.Q + W - 1) / W * W),
          Np((s.N + W - 1) / W * W), B(Q * Np), C(Q * Np), BT(N * Qp), CT(N * Qp), S(Q * Qp), M(Q * Qp), gM(Q * Qp),
          gS(Q * Qp), XT(P * Qp), YT(P * Qp), X(Q * P), E(Q * P), gB(Q * Np), gC(Q * Np), part_C(Q * Np), h0(P * Np),
          high(Qp), low(Qp), dt(Qp), since(Qp), left(Qp), left_dt(Qp), rows(Qp), columns(Qp), gs(Q) {}

    int64_t r() const { return s.H / s.G; }
    F* state() { return &states[(head - g * r()) / s.parts * P * Np]; }
    const F* x() const { return s.x + b * s.xr + t0 * s.xt + head * P; }
    int64_t y_at() const { return ((b * s.L + t0) * s.H + head) * P; }               // in (R, L, H, P)
    int64_t dt_at(int64_t t) const { return (b * s.L + t0 + t) * s.H + head; }
    int64_t outer(int64_t t) const { return (((part * s.R + b) * s.L + t0 + t) * s.G + g) * N; }
    F* bound() const { return s.bounds + ((t0 / Q * s.R + b) * s.H + head) * PN; }

    template <class Body> void heads(Body body) {
        for (head = g * r() + part; head < (g + 1) * r(); head += s.parts) body();
    }
    void load(F* to, const F* from) const { for (int64_t p = 0; p < P; p++) std::copy_n(from + p * N, N, to + p * Np); }
    void store(F* to, const F* from) const { for (int64_t p = 0; p < P; p++) std::copy_n(from + p * Np, N, to + p * N); }
    static bool empty(const F* x, int64_t n) { return std::all_of(x, x + n, [](F v) { return v == 0; }); }

    // B or C of the group in this chunk, as it is and transposed.
    void tile(const F* from, int64_t step, std::vector<F>& as_is, std::vector<F>& transposed) {
        for (int64_t t = 0; t < q; t++)
            for (int64_t n = 0; n < N; n++) as_is[t * Np + n] = transposed[n * Qp + t] = from[t * step + n];
    }

    // The running sums of a = dt A of a head, in two parts that keep their digits, and the decays that hang on them.
    void decays() {
        double sum = 0;
        for (int64_t t = 0; t < q; t++) {
            dt[t] = s.dt[dt_at(t)];
            sum += double(dt[t] * s.A[head]);
            high[t] = F(sum);
            low[t] = F(sum - high[t]);
        }
        kept = decay(F(sum));
        for (int64_t t = 0; t < q; t++) {
            since[t] = decay(high[t]);
            left[t] = decay((high[q - 1] - high[t]) + (low[q - 1] - low[t]));
            left_dt[t] = left[t] * dt[t];
        }
    }

    void begin(std::vector<F>& scaled, const F* from, int64_t step, const std::vector<F>& by) {
        for (int64_t t = 0; t < q; t++)
            for (int64_t p = 0; p < P; p++) scaled[t * P + p] = by[t] * from[t * step + p];
    }

    void forward() {
        states.resize((r() + s.parts - 1) / s.parts * P * Np);
        heads([&] { load(state(), s.h + (b * s.H + head) * PN); });
        for (t0 = 0; t0 < s.L; t0 += Q) {
            q = std::min(Q, s.L - t0);
            tile(s.B + b * s.br + t0 * s.bt + g * N, s.bt, B, BT);
            tile(s.C + b * s.cr + t0 * s.ct + g * N, s.ct, C, CT);
            product(q, Qp, N, &B[0], Np, 1, &CT[0], Qp, &S[0], Qp, false, ROWS_UPTO);
            heads([&] { chunk(); });
        }
        heads([&] { store(s.h + (b * s.H + head) * PN, state()); });
    }

    void chunk() {
        decays();
        F *h = state(), *y = s.y + y_at();
        const F *D = s.D + head * P, *u = x();
        store(bound(), h);
        for (int64_t j = 0; j < q; j++) {                       // 1. the masked matrix, transposed
            F *m = &M[j * Qp];
            const F *score = &S[j * Qp], high_j = high[j], low_j = low[j], dt_j = dt[j];
            for (int64_t i = j / (2 * W) * (2 * W); i < j; i++) m[i] = 0;
            #pragma omp simd
            for (int64_t i = j; i < q; i++) m[i] = score[i] * decay((high[i] - high_j) + (low[i] - low_j)) * dt_j;
        }
        const bool nothing = empty(h, P * Np);
        if (!nothing) {                                         // 2. read the state before the chunk
            product(P, Qp, N, h, Np, 1, &CT[0], Qp, &YT[0], Qp);
            for (int64_t p = 0; p < P; p++)
                #pragma omp simd
                for (int64_t i = 0; i < q; i++) YT[p * Qp + i] *= since[i];
        }
        product(P, Qp, q, u, 1, s.xt, &M[0], Qp, &YT[0], Qp, !nothing, TERMS_UPTO);
        for (int64_t t = 0; t < q; t++)
            for (int64_t p = 0; p < P; p++) y[t * s.H * P + p] = YT[p * Qp + t] + D[p] * u[t * s.xt + p];
        begin(X, u, s.xt, left_dt);                             // 3. carry it on, write to it
        if (!nothing) for (int64_t i = 0; i < P * Np; i++) h[i] *= kept;
        product(P, Np, q, &X[0], 1, P, &B[0], Np, h, Np, true);
    }

    void backward() {
        states.resize((r() + s.parts - 1) / s.parts * P * Np);
        heads([&] { load(state(), s.h + (b * s.H + head) * PN); });
        for (t0 = (s.L - 1) / Q * Q; t0 >= 0; t0 -= Q) {
            q = std::min(Q, s.L - t0);
            tile(s.B + b * s.br + t0 * s.bt + g * N, s.bt, B, BT);
            tile(s.C + b * s.cr + t0 * s.ct + g * N, s.ct, C, CT);
            product(q, Qp, N, &C[0], Np, 1, &BT[0], Qp, &S[0], Qp, false, ROWS_FROM);
            for (auto* x : {&gS, &gB, &gC}) std::fill(x->begin(), x->end(), F(0));
            heads([&] { chunk_back(); });
            product(q, Np, q, &gS[0], Qp, 1, &B[0], Np, &gC[0], Np, true);
            product(q, Np, q, &gS[0], 1, Qp, &C[0], Np, &gB[0], Np, true);
            for (int64_t t = 0; t < q; t++) {
                std::copy_n(&gB[t * Np], N, s.gB + outer(t));
                std::copy_n(&gC[t * Np], N, s.gC + outer(t));
            }
        }
        heads([&] { store(s.h + (b * s.H + head) * PN, state()); });
    }

    // The gradient through the masked matrix: of the scores into gS, of the running sums into gs; M itself once more.
    void matrix_back() {
        std::fill(columns.begin(), columns.end(), F(0));
        for (int64_t i = 0; i < q; i++) {
            F *m = &M[i * Qp], *gm = &gM[i * Qp], *gs_i = &gS[i * Qp], sum = 0;
            const F *score = &S[i * Qp], high_i = high[i], low_i = low[i];
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j <= i; j++) {
                const F d = decay((high_i - high[j]) + (low_i - low[j])), e = score[j] * d, w = gm[j] * e;
                m[j] = e * dt[j];
                gs_i[j] += gm[j] * d * dt[j];
                columns[j] += w;
                sum += w * dt[j];
            }
            rows[i] = sum;
            for (int64_t j = i + 1; j < std::min(Qp, i / (2 * W) * (2 * W) + 2 * W); j++) m[j] = 0;
        }
    }

    void chunk_back() {
        decays();
        F *gh = state(), *gx = s.gx + y_at(), *gD = s.gD + (b * s.H + head) * P;
        const F *gy = s.gy + y_at(), *u = x(), *D = s.D + head * P;
        const int64_t step = s.H * P;
        load(&h0[0], bound());
        const bool first = empty(&h0[0], P * Np), last = empty(gh, P * Np);
        for (int64_t t = 0; t < q; t++)
            for (int64_t p = 0; p < P; p++) {
                XT[p * Qp + t] = u[t * s.xt + p];
                gD[p] += gy[t * step + p] * u[t * s.xt + p];
            }
        begin(E, gy, step, since);
        begin(X, u, s.xt, left_dt);

        product(q, Qp, P, gy, step, 1, &XT[0], Qp, &gM[0], Qp, false, ROWS_FROM);    // 1. the masked matrix
        matrix_back();
        for (int64_t t = 0; t < q; t++) gs[t] = double(rows[t]) - double(columns[t] * dt[t]);
        if (!first) {                                                                // 2. what was read
            product(q, Np, P, &E[0], P, 1, &h0[0], Np, &part_C[0], Np);
            for (int64_t t = 0; t < q; t++) {
                F sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t n = 0; n < Np; n++) {
                    sum += C[t * Np + n] * part_C[t * Np + n];
                    gC[t * Np + n] += part_C[t * Np + n];
                }
                gs[t] += sum;
            }
        }
        if (!last) {                                                                 // 3. what was carried and written
            product(q, Np, P, &X[0], P, 1, gh, Np, &gB[0], Np, true);
            product(P, Qp, N, gh, Np, 1, &BT[0], Qp, &YT[0], Qp);
            std::fill(rows.begin(), rows.end(), F(0));
            for (int64_t p = 0; p < P; p++)
                #pragma omp simd
                for (int64_t t = 0; t < q; t++) {
                    rows[t] += YT[p * Qp + t] * XT[p * Qp + t];
                    YT[p * Qp + t] *= left_dt[t];
                }
            double sum = 0;
            if (!first) for (int64_t i = 0; i < P * Np; i++) sum += double(gh[i] * h0[i]);
            gs[q - 1] += sum * kept;
            for (int64_t t = 0; t < q; t++) {
                columns[t] += left[t] * rows[t];
                gs[t] -= double(left_dt[t] * rows[t]);
                gs[q - 1] += double(left_dt[t] * rows[t]);
            }
            for (int64_t i = 0; i < P * Np; i++) gh[i] *= kept;
        }
        product(P, Qp, q, gy, 1, step, &M[0], Qp, &YT[0], Qp, !last, TERMS_FROM);
        for (int64_t t = 0; t < q; t++)
            for (int64_t p = 0; p < P; p++) gx[t * step + p] = YT[p * Qp + t] + D[p] * gy[t * step + p];
        product(P, Np, q, &E[0], 1, P, &C[0], Np, gh, Np, true);

        double sum = 0, gA = 0;                                 // the running sums, then dt and A
        for (int64_t t = q - 1; t >= 0; t--) {
            sum += gs[t];
            s.gdt[dt_at(t)] = F(columns[t] + sum * s.A[head]);
            gA += sum * dt[t];
        }
        s.gA[b * s.H + head] += F(gA);
    }
};

template <class F> void ssd(const Ssd<F>& s) {
    #pragma omp parallel for collapse(3) num_threads(s.threads)
    for (int64_t b = 0; b < s.R; b++)
        for (int64_t g = 0; g < s.G; g++)
            for (int64_t part = 0; part < s.parts; part++) {
                Heads<F> heads(s, b, g, part);
                s.gy ? heads.backward() : heads.forward();
            }
}

extern "C" void ssd_float32(const Ssd<float>* s) { ssd(*s); }
extern "C" void ssd_float64(const Ssd<double>* s) { ssd(*s); }
