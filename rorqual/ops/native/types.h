/* One source for two element types: a file of kernels is included once with ELEMENT_BF16 and once without.
 *
 *   T          an element: float, or bf16 kept as its 16 bits
 *   WORD       32 bits that enter one multiply-add: a float, or two bf16 next to each other
 *   PER_WORD   elements in a word
 *   NAME(f)    f, or f_bf16
 *   GET, PUT   one element from and to fp32; LOAD, STORE: up to a vector of them (see vectors.h)
 *
 * Arithmetic is fp32 in both cases; a bf16 product of two words adds two terms to one fp32 sum. */

#undef T
#undef WORD
#undef PER_WORD
#undef NAME
#undef GET
#undef PUT
#undef LOAD
#undef STORE

#ifdef ELEMENT_BF16
#define T uint16_t
#define WORD uint32_t
#define PER_WORD 2
#define NAME(f) f##_bf16
#define GET(p, i) from_bf16((p)[i])
#define PUT(p, i, v) ((p)[i] = to_bf16(v))
#define LOAD load_bf16
#define STORE store_bf16
#else
#define T float
#define WORD float
#define PER_WORD 1
#define NAME(f) f
#define GET(p, i) ((p)[i])
#define PUT(p, i, v) ((p)[i] = (v))
#define LOAD load
#define STORE store
#endif
