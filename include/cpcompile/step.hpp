/// What an engine gives for the tokens of a step: scores of those to follow, and the cache for the next step.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace cpcompile {

/// Scores of the next token, (batch, kept, vocabulary).
class Logits {
 public:
    explicit Logits(Ort::Value value)
        : value_(std::move(value)), shape_(value_.GetTensorTypeAndShapeInfo().GetShape()) {}
    std::size_t batch() const { return static_cast<std::size_t>(shape_[0]); }
    std::size_t kept() const { return static_cast<std::size_t>(shape_[1]); }
    std::size_t vocabulary() const { return static_cast<std::size_t>(shape_[2]); }
    /// The scores of all tokens to follow the one at `position` of `row`.
    const float* at(std::size_t row, std::size_t position) const {
        return value_.GetTensorData<float>() + (row * kept() + position) * vocabulary();
    }

 private:
    Ort::Value value_;
    std::vector<std::int64_t> shape_;
};

/// Keys and values of the tokens so far. Steps leave it as it is, so that several texts can go on from it.
class Cache {
 public:
    std::size_t length() const { return length_; }

 private:
    friend class Engine;

    /// Makes room for so many tokens of `batch` texts; memory that nothing is written to is not taken.
    /// shapes: of the values, (batch, heads, tokens, channels), where only heads and channels count.
    void grow(const std::vector<std::vector<std::int64_t>>& shapes, std::size_t batch, std::size_t room) {
        for (std::size_t index = 0; index < shapes.size(); ++index) {
            const std::int64_t heads = shapes[index].at(1), channels = shapes[index].at(3);
            const std::int64_t shape[] = {static_cast<std::int64_t>(batch), heads, static_cast<std::int64_t>(room),
                                          channels};
            Ort::Value larger = Ort::Value::CreateTensor<float>(Ort::AllocatorWithDefaultOptions(), shape, 4);
            const std::size_t size = static_cast<std::size_t>(channels), rows = batch * static_cast<std::size_t>(heads);
            for (std::size_t row = 0; row < rows && length_ > 0; ++row)
                std::copy_n(values_[index].GetTensorData<float>() + row * room_ * size, length_ * size,
                            larger.GetTensorMutableData<float>() + row * room * size);
            if (index < values_.size())
                values_[index] = std::move(larger);
            else
                values_.push_back(std::move(larger));
        }
        room_ = room;
    }

    std::vector<Ort::Value> values_;
    std::size_t length_ = 0;
    std::size_t room_ = 0;  ///< For how many tokens there is room; 0 where the values are as long as the texts.
};

struct Step {
    Logits logits;
    Cache cache;
};

}  // namespace cpcompile
