/* generate_c BUNDLE CONTEXT ID...: continues a text, given as token ids, and prints the ids of the new tokens. */
#include <cpcompile/cpcompile.h>
#include <stdio.h>
#include <stdlib.h>

static int print_token(int64_t token, void* data) {
    (void)data;
    printf("%lld\n", (long long)token);
    return 1;
}

int main(int count, char** arguments) {
    cpcompile_bundle* bundle = NULL;
    cpcompile_engine* engine = NULL;
    int64_t ids[1024];
    int length = 0;
    while (length < 1024 && length + 3 < count) {
        ids[length] = atoll(arguments[length + 3]);
        ++length;
    }
    int code = count > 2 ? cpcompile_open(arguments[1], &bundle) : 2;
    if (code == 0) code = cpcompile_load(bundle, arguments[2], NULL, &engine);
    if (code == 0) code = cpcompile_generate(engine, ids, (size_t)length, NULL, print_token, NULL);
    if (code != 0) fprintf(stderr, "%s\n", count > 2 ? cpcompile_error() : "usage: generate_c BUNDLE CONTEXT ID...");
    cpcompile_unload(engine);
    cpcompile_close(bundle);
    return code;
}
