// Eight threads send requests to all contexts of a bundle; each answer has to be the one that a single thread gets, and
// what the process holds may not grow. Engines are loaded and closed meanwhile.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cpcompile/cpcompile.hpp>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

inline long resident_kilobytes() {
    long pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

struct Request {
    std::string context;
    cpcompile::Engine::Batch prompts;
    cpcompile::Sampling sampling;
    cpcompile::Engine::Batch expected;
};

inline cpcompile::detail::Json run_threads(const std::string& path, int requests) {
    const cpcompile::Runtime runtime(2);
    const auto bundle = cpcompile::open_bundle(path);
    std::map<std::string, cpcompile::Engine> engines;
    for (const std::string& context : bundle.contexts()) engines.emplace(context, runtime.load(bundle, context));

    std::vector<Request> kinds;
    for (const auto& [context, engine] : engines)
        for (std::uint64_t variety = 0; variety < 4; ++variety) {
            Request request{
                context, {cpcompile::Tokens(1 + 2 * variety, static_cast<std::int64_t>(7 + variety))}, {}, {}};
            if (variety % 2 == 1) request.prompts.push_back({3, 1, 4});
            request.sampling.max_new_tokens = 4 + variety;
            request.sampling.temperature = variety > 1 ? 0.9 : 0;
            request.sampling.top_k = 50;
            request.sampling.seed = variety;
            request.expected = engine.generate(request.prompts, request.sampling);
            kinds.push_back(request);
        }

    std::atomic<int> next{0}, wrong{0};
    const auto work = [&] {
        for (int number = next++; number < requests; number = next++) {
            const Request& request = kinds[static_cast<std::size_t>(number) % kinds.size()];
            const auto answer = number % 50 == 49  // with a second engine, which has to be the same session
                                    ? runtime.load(bundle, request.context).generate(request.prompts, request.sampling)
                                    : engines.at(request.context).generate(request.prompts, request.sampling);
            if (answer != request.expected) ++wrong;
        }
    };
    const auto run = [&work, &next] {
        next = 0;
        std::vector<std::thread> threads;
        for (int index = 0; index < 8; ++index) threads.emplace_back(work);
        for (std::thread& thread : threads) thread.join();
    };
    run();  // the first requests fill the arenas
    const long before = resident_kilobytes();
    run();
    const long after = resident_kilobytes();
    return {{"wrong", wrong.load()}, {"before", before}, {"after", after}};
}
