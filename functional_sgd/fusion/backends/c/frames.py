"""What is around the lines of a pass in C: the functions that they stand in."""

CHUNK_BY_ELEMENT = """\
/* Elements [start, start + count) of one leaf; `part` is what they add to each reduction. */
static void chunk(char *const *pointers, int64_t start, int64_t count, const double *restrict s,
                  double *restrict part) {{
{scalars}
{bind}
{begin_takes}
{pragma}
    for (int64_t i = 0; i < count; ++i) {{
{body}
    }}
{end_takes}
}}"""
"""A chunk of a leaf, where each element is by itself."""

# Whole blocks pass a constant count to an inlined `block`, so that the compiler knows the length
# of its loops.
CHUNK_BY_BLOCK = """\
/* A block: elements [start, start + count) of one leaf, at most {block}. What all have in common is
   known after a loop over them; what later loops need of earlier ones is kept meanwhile. */
static inline __attribute__((always_inline)) void block(
    char *const *pointers, int64_t start, const int64_t count, const double *restrict s,
    double *restrict part) {{
{scalars}
{bind}
{begin_takes}
{body}
{end_takes}
}}

/* Elements [start, start + count) of one leaf; `part` is what they add to each reduction. */
static void chunk(char *const *pointers, int64_t start, int64_t count, const double *restrict s,
                  double *restrict part) {{
    {first}
    int64_t done = 0;
    for (; done + {block} <= count; done += {block})
        block(pointers, start + done, {block}, s, part);
    if (done < count) block(pointers, start + done, count - done, s, part);
}}"""
"""A chunk of a leaf, where the elements of a block have something in common."""

KERNEL = """\

/* {title} */

/* The scalars of one step: hyper[0..{n_hypers}) -> s[0..{n_scalars}). */
static void prepare(const double *restrict hyper, double *restrict s) {{
{prepare}
}}

{chunk}

/* All leaves, in chunks: chunk c is part of leaf[c], whose scalars come from row[leaf[c]] of the
   hypers. Column k of leaf l is at pointers[l + k * n_leaves]. Each chunk has a place of its own
   for its part of the reductions, so that the order of additions does not depend on threads. */
void run(int64_t n_leaves, char *const *pointers, int64_t n_rows, const double *hypers,
         const int32_t *row, int64_t n_chunks, const int32_t *leaf, const int64_t *start,
         const int64_t *count, double *scratch, double *parts, double *totals, int threads) {{
    for (int64_t r = 0; r < n_rows; ++r)
        prepare(hypers + r * {n_hypers}, scratch + r * {stride});
    int64_t grain = n_chunks / (8 * threads) + 1;
    #pragma omp parallel for schedule(dynamic, grain) num_threads(threads) \\
        if (n_chunks > 1 && threads > 1)
    for (int64_t c = 0; c < n_chunks; ++c) {{
        int64_t l = leaf[c];
        char *here[{n_columns} + 1];
        for (int k = 0; k < {n_columns}; ++k) here[k] = pointers[l + k * n_leaves];
        chunk(here, start[c], count[c], scratch + row[l] * {stride}, parts + c * {n_takes});
    }}
{combine}
}}
"""
"""The whole kernel, around the function of a chunk."""

COMBINE = """\
    for (int64_t l = 0; l < n_leaves; ++l) {{ {first} }}
    for (int64_t c = 0; c < n_chunks; ++c) {{
        double *total = totals + leaf[c] * {n_takes}, *part = parts + c * {n_takes};
        {more}
    }}"""
"""How the parts of all chunks are brought together, in their order."""
