// generate BUNDLE CONTEXT TEXT: continues a text and prints it as it comes.
#include <cpcompile/cpcompile.hpp>
#include <iostream>

int main(int count, char** arguments) try {
    if (count != 4) throw cpcompile::UsageError("usage: generate BUNDLE CONTEXT TEXT");
    const auto bundle = cpcompile::open_bundle(arguments[1]);
    const auto engine = cpcompile::load(bundle, arguments[2]);
    const cpcompile::Tokenizer tokenizer(bundle, arguments[2]);
    cpcompile::Sampling sampling;
    sampling.max_new_tokens = 60;
    sampling.temperature = 0.7;
    std::cout << arguments[3];
    tokenizer.generate(engine, arguments[3], sampling, [](const std::string& piece) {
        std::cout << piece << std::flush;
        return true;
    });
    std::cout << "\n";
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
