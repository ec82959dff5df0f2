/// Loads engines: verifies their files, and shares between them what can be shared.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "bundle.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "runtime.hpp"

namespace cpcompile {

/// What the engines of a process share: threads, models and weights. Copies are the same runtime, which ends with its
/// last copy or engine.
class Runtime {
 public:
    /// threads: of all engines together; 0 leaves the number to ONNX Runtime, or takes the runtime that there is.
    /// UsageError: a process has one runtime, and there is one with another number of threads.
    explicit Runtime(int threads = 0) {
        static std::mutex mutex;
        static std::weak_ptr<detail::Environment> existing;
        if (threads < 0)
            throw UsageError("threads is " + std::to_string(threads) +
                             ": it cannot be negative; 0 leaves the number to ONNX Runtime");
        const std::lock_guard<std::mutex> lock(mutex);
        environment_ = existing.lock();
        if (environment_ && threads != 0 && threads != environment_->threads())
            throw UsageError("threads is " + std::to_string(threads) + ", and this process has a runtime with " +
                             std::to_string(environment_->threads()) + "; make one at the start and keep it");
        if (!environment_) existing = environment_ = std::make_shared<detail::Environment>(threads);
    }

    /// Verifies and loads one engine. Engines of the same file share one session.
    /// UsageError: no such context or variant, a damaged or missing file, a reference to a file that is not its own.
    /// Error: ONNX Runtime refuses the model, or the variant needs something else than its CPU provider.
    Engine load(const Bundle& bundle, const std::string& context, const std::string& variant = "best") const {
        Variant chosen = bundle.variant(context, variant);
        if (chosen.plan)
            throw UsageError(chosen.model.string() + ": is a plan of " + chosen.runtime +
                             ", which ONNX Runtime does not run");
        if (chosen.runtime == "openvino")
            throw UsageError(chosen.model.string() +
                             ": is an engine of OpenVINO, which this library does not run; choose another variant");
        if (chosen.provider != "CPUExecutionProvider")
            throw Error(chosen.model.string() + ": needs " + chosen.provider +
                        ", and this library runs engines on the CPU; choose another variant");
        bundle.verify_engine(chosen);
        auto model = find_or_load(chosen, bundle.digest(chosen.model));
        return Engine(std::move(chosen), bundle.generation(context).value_or(GenerationSettings()),
                      bundle.reads_text(context), std::move(model));
    }

 private:
    std::shared_ptr<detail::LoadedModel> find_or_load(const Variant& variant, const std::string& digest) const {
        const std::string folder = variant.weights ? std::filesystem::canonical(*variant.weights).string() : "";
        const std::lock_guard<std::mutex> lock(environment_->mutex);
        std::weak_ptr<detail::LoadedModel>& known = environment_->models[digest + folder];
        if (auto model = known.lock()) return model;
        auto model = std::make_shared<detail::LoadedModel>();
        model->environment = environment_;
        Ort::SessionOptions options;
        options.DisablePerSessionThreads().AddConfigEntry("session.use_env_allocators", "1");
        for (const auto& [key, value] : variant.session_options) options.AddConfigEntry(key.c_str(), value.c_str());
        try {
            if (variant.weights) share(*model, variant, folder, options);
            model->session = variant.weights ? Ort::Session(environment_->env(), variant.model.c_str(), options,
                                                            model->weights->prepacked.container)
                                             : Ort::Session(environment_->env(), variant.model.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw Error(variant.model.string() + ": ONNX Runtime " + OrtGetApiBase()->GetVersionString() +
                        " cannot load it: " + error.what());
        }
        if (model->weights)
            for (const auto& file : model->weights->files) file.second.forget();  // most of it was packed
        known = model;
        return model;
    }

    /// Makes sessions use the same weights and the same packed matrices: ONNX Runtime shares those that it is given as
    /// initializers.
    void share(detail::LoadedModel& model, const Variant& variant, const std::string& folder,
               Ort::SessionOptions& options) const {
        options.AddConfigEntry("session.model_external_initializers_file_folder_path", folder.c_str());
        std::weak_ptr<detail::SharedWeights>& known = environment_->weights[folder];
        model.weights = known.lock();
        if (!model.weights) known = model.weights = std::make_shared<detail::SharedWeights>();
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
        for (const detail::Reference& tensor : detail::references_of(variant.model)) {
            if (!tensor.initializer || !tensor.length) continue;
            const auto& file =
                model.weights->files.try_emplace(tensor.location, folder + "/" + tensor.location).first->second;
            if (tensor.end() > file.bytes().size()) throw Error(folder + ": has changed since it was verified");
            char* data = const_cast<char*>(file.bytes().data()) + tensor.offset;  // ONNX Runtime only reads it
            model.initializers.push_back(Ort::Value::CreateTensor(memory, data, *tensor.length, tensor.shape.data(),
                                                                  tensor.shape.size(),
                                                                  static_cast<ONNXTensorElementDataType>(tensor.type)));
            options.AddInitializer(tensor.name.c_str(), model.initializers.back());
        }
    }

    std::shared_ptr<detail::Environment> environment_;
};

/// Loads one engine with the runtime of this process, which is made if there is none.
inline Engine load(const Bundle& bundle, const std::string& context, const std::string& variant = "best") {
    return Runtime().load(bundle, context, variant);
}

}  // namespace cpcompile
