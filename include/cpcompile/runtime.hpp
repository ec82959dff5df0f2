/// What the engines of a process share: ONNX Runtime's environment with one thread pool, loaded models and weights.
#pragma once

#include <onnxruntime_cxx_api.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "error.hpp"
#include "external_data.hpp"
#include "files.hpp"

namespace cpcompile {
namespace detail {

struct PrepackedWeights {
    PrepackedWeights() { Ort::ThrowOnError(Ort::GetApi().CreatePrepackedWeightsContainer(&container)); }
    ~PrepackedWeights() { Ort::GetApi().ReleasePrepackedWeightsContainer(container); }
    PrepackedWeights(const PrepackedWeights&) = delete;
    PrepackedWeights& operator=(const PrepackedWeights&) = delete;
    OrtPrepackedWeightsContainer* container = nullptr;
};

/// The weights of a bundle in memory, and what ONNX Runtime packs of them. Both stay until the last engine is gone that
/// uses them.
struct SharedWeights {
    std::map<std::string, MappedFile> files;
    PrepackedWeights prepacked;
};

class Environment;

/// A model in memory, with what has to outlive its session.
struct LoadedModel {
    LoadedModel() = default;
    LoadedModel(const LoadedModel&) = delete;
    LoadedModel& operator=(const LoadedModel&) = delete;
    ~LoadedModel() {
        session = Ort::Session(nullptr);
        weights.reset();
#ifdef __GLIBC__
        malloc_trim(0);  // it would keep most of what was freed
#endif
    }

    std::shared_ptr<Environment> environment;
    std::shared_ptr<SharedWeights> weights;
    std::vector<Ort::Value> initializers;
    Ort::Session session{nullptr};
};

class Environment {
 public:
    explicit Environment(int threads) : threads_(threads), env_(create(threads)) {}
    int threads() const { return threads_; }
    Ort::Env& env() { return env_; }
    std::mutex mutex;
    std::map<std::string, std::weak_ptr<LoadedModel>> models;
    std::map<std::string, std::weak_ptr<SharedWeights>> weights;

 private:
    static Ort::Env create(int threads) {
        if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr)
            throw Error("this program was compiled for ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                        ", and the older " + OrtGetApiBase()->GetVersionString() + " was loaded; install a newer one");
        Ort::ThreadingOptions options;
        options.SetGlobalIntraOpNumThreads(threads).SetGlobalInterOpNumThreads(1);
        Ort::Env env(options, ORT_LOGGING_LEVEL_ERROR, "cpcompile");
        // One arena for all sessions, which grows by what is asked for. A program that has made an Ort::Env before may
        // have given it an arena; then that one serves.
        try {
            env.CreateAndRegisterAllocator(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault),
                                           Ort::ArenaCfg(0, 1, -1, -1));
        } catch (const Ort::Exception&) {
        }
        return env;
    }
    int threads_;
    Ort::Env env_;
};

}  // namespace detail
}  // namespace cpcompile
