/// cpcompile for C++17: open a bundle, run its engines, generate text.
///
///     auto bundle = cpcompile::open_bundle("model.cpc");
///     auto engine = cpcompile::load(bundle, "english");
///     cpcompile::Tokens ids = engine.generate({1, 2, 3});
///
/// Linux and macOS; needs ONNX Runtime 1.21 or newer, nlohmann-json and OpenSSL.
#pragma once

#include "bundle.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "load.hpp"
#include "sampling.hpp"
#include "tokenizer.hpp"
