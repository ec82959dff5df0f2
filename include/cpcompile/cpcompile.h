/* cpcompile for C and for languages that call C: open a bundle, load an engine, generate token ids.
 *
 * Functions that can fail return 0, or 1 if the work failed, or 2 if the input is wrong, as the exit codes of the
 * command line; `cpcompile_error` then says why. All of them may be called from several threads. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define CPCOMPILE_API __attribute__((visibility("default")))
#else
#define CPCOMPILE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cpcompile_bundle cpcompile_bundle;
typedef struct cpcompile_engine cpcompile_engine;

/* How a text is continued; see `Sampling` in sampling.hpp. */
typedef struct cpcompile_sampling {
    size_t max_new_tokens;
    double temperature;
    size_t top_k;
    double top_p;
    double repetition_penalty;
    uint64_t seed;
    int seeded;      /* whether `seed` counts; if not, samples differ from call to call */
    int stop_at_end; /* whether the ids that the bundle records end a text */
} cpcompile_sampling;

/* Takes each new token as it comes; 0 ends the text. */
typedef int (*cpcompile_on_token)(int64_t token, void* data);

/* Why the last call of this thread failed; valid until its next call. */
CPCOMPILE_API const char* cpcompile_error(void);

/* Opens and checks a bundle. */
CPCOMPILE_API int cpcompile_open(const char* path, cpcompile_bundle** bundle);
CPCOMPILE_API void cpcompile_close(cpcompile_bundle* bundle);

/* The name of a context, valid until the bundle is closed; NULL from the number of contexts on. */
CPCOMPILE_API const char* cpcompile_context(const cpcompile_bundle* bundle, size_t index);

/* Verifies and loads an engine; variant: NULL for what the build chose, or cpu-fp32. It may outlive its bundle. */
CPCOMPILE_API int cpcompile_load(const cpcompile_bundle* bundle, const char* context, const char* variant,
                                 cpcompile_engine** engine);
CPCOMPILE_API void cpcompile_unload(cpcompile_engine* engine);

/* How many tokens the engine knows; 0 if it is no language model. */
CPCOMPILE_API size_t cpcompile_vocabulary(const cpcompile_engine* engine);

/* The likeliest tokens, at most 128. */
CPCOMPILE_API cpcompile_sampling cpcompile_default_sampling(void);

/* Continues `ids` and passes each new token to `on_token` with `data`; sampling: NULL for the default. */
CPCOMPILE_API int cpcompile_generate(const cpcompile_engine* engine, const int64_t* ids, size_t count,
                                     const cpcompile_sampling* sampling, cpcompile_on_token on_token, void* data);

#ifdef __cplusplus
}
#endif
