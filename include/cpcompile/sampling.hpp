/// Choosing the next token from logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "error.hpp"

namespace cpcompile {

/// How `Engine::generate` continues a text. The defaults choose the likeliest token.
struct Sampling {
    std::size_t max_new_tokens = 128;
    double temperature = 0;         ///< 0 chooses the likeliest token; 1 samples from the model's distribution.
    std::size_t top_k = 0;          ///< Samples only from that many of the likeliest tokens; 0 from all.
    double top_p = 1;               ///< Samples only from the likeliest tokens that together have this probability.
    double repetition_penalty = 1;  ///< Above 1, tokens that have occurred become less likely (CTRL, arXiv 1909.05858).
    std::optional<std::uint64_t> seed;  ///< Repeats the samples; row r of a batch uses `seed + r`.
    Tokens stop;                        ///< Ids that end a text, besides those that the bundle records.
    bool stop_at_end = true;            ///< Whether the ids that the bundle records end a text.
};

namespace detail {

inline void require_valid(const Sampling& sampling) {
    const auto refuse = [](const std::string& name, double value, const std::string& need) {
        throw UsageError(name + " is " + python_float(value) + ": it " + need);
    };
    if (!(sampling.temperature >= 0) || std::isinf(sampling.temperature))
        refuse("temperature", sampling.temperature,
               std::isinf(sampling.temperature) ? "has to be finite" : "cannot be negative");
    if (!(sampling.top_p > 0 && sampling.top_p <= 1))
        refuse("top_p", sampling.top_p, "has to be above 0 and at most 1");
    if (!(sampling.repetition_penalty > 0) || std::isinf(sampling.repetition_penalty))
        refuse("repetition_penalty", sampling.repetition_penalty, "has to be positive");
}

/// Chooses the tokens of one text.
class Sampler {
 public:
    Sampler(const Sampling& sampling, std::size_t row)
        : sampling_(sampling), generator_(sampling.seed ? *sampling.seed + row : random_seed()) {}

    /// The token that follows `before`, given its logits.
    std::int64_t choose(const float* logits, std::size_t vocabulary, const Tokens& before) {
        scores_.assign(logits, logits + vocabulary);
        for (const double score : scores_)
            if (std::isnan(score))
                throw Error("the logits are not numbers (NaN); run `cpcompile validate` on the bundle");
        if (sampling_.repetition_penalty != 1)
            for (const std::int64_t token : std::set<std::int64_t>(before.begin(), before.end())) {
                double& score = scores_[static_cast<std::size_t>(token)];
                score = score < 0 ? score * sampling_.repetition_penalty : score / sampling_.repetition_penalty;
            }
        const auto likeliest = std::max_element(scores_.begin(), scores_.end());
        return sampling_.temperature == 0 ? likeliest - scores_.begin() : sample(*likeliest);
    }

 private:
    static std::uint64_t random_seed() {
        std::random_device device;
        return (std::uint64_t{device()} << 32) ^ device();
    }

    std::int64_t sample(double largest) {
        for (double& score : scores_) score = std::exp((score - largest) / sampling_.temperature);
        order_.resize(scores_.size());
        std::iota(order_.begin(), order_.end(), 0);
        const auto likelier = [this](std::size_t one, std::size_t other) {
            return scores_[one] != scores_[other] ? scores_[one] > scores_[other] : one < other;
        };
        if (sampling_.top_k > 0 && sampling_.top_k < order_.size()) {
            const auto end = order_.begin() + static_cast<std::ptrdiff_t>(sampling_.top_k);
            std::nth_element(order_.begin(), end, order_.end(), likelier);
            order_.erase(end, order_.end());
        }
        const auto total = [this] {
            return std::accumulate(order_.begin(), order_.end(), 0.0,
                                   [this](double sum, std::size_t token) { return sum + scores_[token]; });
        };
        if (sampling_.top_p < 1) {
            std::sort(order_.begin(), order_.end(), likelier);
            double missing = sampling_.top_p * total();
            std::size_t count = 0;
            while (count < order_.size() && missing > 0) missing -= scores_[order_[count++]];
            order_.resize(count);
        }
        // 53 random bits between 0 and 1: std::uniform_real_distribution differs between standard libraries.
        double point = static_cast<double>(generator_() >> 11) * 0x1p-53 * total();
        for (const std::size_t token : order_)
            if ((point -= scores_[token]) < 0) return static_cast<std::int64_t>(token);
        return static_cast<std::int64_t>(order_.back());  // rounding
    }

    const Sampling& sampling_;
    std::mt19937_64 generator_;
    std::vector<double> scores_;
    std::vector<std::size_t> order_;
};

}  // namespace detail
}  // namespace cpcompile
