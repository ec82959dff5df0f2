// genai FOLDER TEXT: continues a text with ONNX Runtime GenAI alone; FOLDER is what `cpcompile export --format genai`
// writes. GenAI's packages bring no headers, so the functions used are declared here.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>

extern "C" {
const char* OgaResultGetError(const void* result);
void* OgaCreateModel(const char* folder, void** model);
void* OgaCreateTokenizer(const void* model, void** tokenizer);
void* OgaCreateTokenizerStream(const void* tokenizer, void** stream);
void* OgaCreateSequences(void** sequences);
void* OgaTokenizerEncode(const void* tokenizer, const char* text, void* sequences);
void* OgaTokenizerStreamDecode(void* stream, std::int32_t token, const char** text);
void* OgaCreateGeneratorParams(const void* model, void** parameters);
void* OgaGeneratorParamsSetSearchNumber(void* parameters, const char* name, double value);
void* OgaCreateGenerator(const void* model, const void* parameters, void** generator);
void* OgaGenerator_AppendTokenSequences(void* generator, const void* sequences);
void* OgaGenerator_GenerateNextToken(void* generator);
bool OgaGenerator_IsDone(const void* generator);
void* OgaGenerator_GetNextTokens(const void* generator, const std::int32_t** tokens, std::size_t* count);
void OgaDestroyGenerator(void*);
void OgaDestroyGeneratorParams(void*);
void OgaDestroySequences(void*);
void OgaDestroyTokenizerStream(void*);
void OgaDestroyTokenizer(void*);
void OgaDestroyModel(void*);
void OgaShutdown();
}

static void check(const void* result) {
    if (result == nullptr) return;
    std::cerr << OgaResultGetError(result) << "\n";
    std::exit(1);
}

int main(int count, char** arguments) {
    if (count != 3) return std::cerr << "usage: genai FOLDER TEXT\n", 2;
    void *model, *tokenizer, *stream, *sequences, *parameters, *generator;
    check(OgaCreateModel(arguments[1], &model));
    check(OgaCreateTokenizer(model, &tokenizer));
    check(OgaCreateTokenizerStream(tokenizer, &stream));
    check(OgaCreateSequences(&sequences));
    check(OgaTokenizerEncode(tokenizer, arguments[2], sequences));
    check(OgaCreateGeneratorParams(model, &parameters));
    check(OgaGeneratorParamsSetSearchNumber(parameters, "max_length", 64));
    check(OgaCreateGenerator(model, parameters, &generator));
    check(OgaGenerator_AppendTokenSequences(generator, sequences));
    std::cout << arguments[2];
    while (!OgaGenerator_IsDone(generator)) {
        const std::int32_t* token = nullptr;
        const char* text = nullptr;
        std::size_t number = 0;
        check(OgaGenerator_GenerateNextToken(generator));
        check(OgaGenerator_GetNextTokens(generator, &token, &number));
        check(OgaTokenizerStreamDecode(stream, *token, &text));
        std::cout << text << std::flush;
    }
    std::cout << "\n";
    OgaDestroyGenerator(generator);
    OgaDestroyGeneratorParams(parameters);
    OgaDestroySequences(sequences);
    OgaDestroyTokenizerStream(stream);
    OgaDestroyTokenizer(tokenizer);
    OgaDestroyModel(model);
    OgaShutdown();
}
