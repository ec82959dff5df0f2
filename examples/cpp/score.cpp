// score BUNDLE CONTEXT ID...: the mean loss of a text, given as token ids, in nats per token.
#include <cmath>
#include <cpcompile/cpcompile.hpp>
#include <iostream>
#include <string>

int main(int count, char** arguments) try {
    if (count < 5) throw cpcompile::UsageError("usage: score BUNDLE CONTEXT ID ID...");
    const auto bundle = cpcompile::open_bundle(arguments[1]);
    const auto engine = cpcompile::load(bundle, arguments[2]);
    cpcompile::Tokens ids;
    for (int index = 3; index < count; ++index) ids.push_back(std::stoll(arguments[index]));
    const auto logits = engine.run({ids});
    double loss = 0;
    for (std::size_t position = 0; position + 1 < ids.size(); ++position) {
        const float* scores = logits.at(0, position);
        double sum = 0;
        for (std::size_t token = 0; token < logits.vocabulary(); ++token) sum += std::exp(scores[token]);
        loss += std::log(sum) - scores[ids[position + 1]];
    }
    std::cout << loss / static_cast<double>(ids.size() - 1) << "\n";
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
