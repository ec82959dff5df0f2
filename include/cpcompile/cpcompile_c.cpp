// The C interface: cpcompile.h in terms of cpcompile.hpp. CMake builds it as cpcompile_c with -DCPCOMPILE_C=ON.
#include <string>

#include "cpcompile.h"
#include "cpcompile.hpp"

struct cpcompile_bundle {
    cpcompile::Bundle bundle;
};

struct cpcompile_engine {
    cpcompile::Engine engine;
};

namespace {

thread_local std::string last_error;

/// Runs `work`; no exception may reach C.
template <typename Work>
int guarded(const Work& work) noexcept {
    try {
        work();
        return 0;
    } catch (const cpcompile::UsageError& error) {
        last_error = error.what();
        return 2;
    } catch (const std::exception& error) {
        last_error = error.what();
        return 1;
    } catch (...) {
        last_error = "an unknown exception";
        return 1;
    }
}

}  // namespace

const char* cpcompile_error(void) { return last_error.c_str(); }

int cpcompile_open(const char* path, cpcompile_bundle** bundle) {
    return guarded([&] { *bundle = new cpcompile_bundle{cpcompile::open_bundle(path)}; });
}

void cpcompile_close(cpcompile_bundle* bundle) { delete bundle; }

const char* cpcompile_context(const cpcompile_bundle* bundle, size_t index) {
    const auto& contexts = bundle->bundle.contexts();
    return index < contexts.size() ? contexts[index].c_str() : nullptr;
}

int cpcompile_load(const cpcompile_bundle* bundle, const char* context, const char* variant,
                   cpcompile_engine** engine) {
    return guarded([&] {
        *engine =
            new cpcompile_engine{cpcompile::load(bundle->bundle, context, variant != nullptr ? variant : "best")};
    });
}

void cpcompile_unload(cpcompile_engine* engine) { delete engine; }

size_t cpcompile_vocabulary(const cpcompile_engine* engine) {
    return static_cast<size_t>(engine->engine.vocabulary().value_or(0));
}

cpcompile_sampling cpcompile_default_sampling(void) {
    const cpcompile::Sampling plain;
    return {plain.max_new_tokens, plain.temperature, plain.top_k, plain.top_p, plain.repetition_penalty, 0, 0, 1};
}

int cpcompile_generate(const cpcompile_engine* engine, const int64_t* ids, size_t count,
                       const cpcompile_sampling* sampling, cpcompile_on_token on_token, void* data) {
    return guarded([&] {
        const cpcompile_sampling given = sampling != nullptr ? *sampling : cpcompile_default_sampling();
        cpcompile::Sampling own;
        own.max_new_tokens = given.max_new_tokens;
        own.temperature = given.temperature;
        own.top_k = given.top_k;
        own.top_p = given.top_p;
        own.repetition_penalty = given.repetition_penalty;
        if (given.seeded != 0) own.seed = given.seed;
        own.stop_at_end = given.stop_at_end != 0;
        engine->engine.generate(cpcompile::Tokens(ids, ids + count), own,
                                [&](std::int64_t token) { return on_token(token, data) != 0; });
    });
}
