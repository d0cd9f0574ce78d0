/* Asks a bundle about an image, through onnxruntime-genai's C API:
 *   mobilevlm export CHECKPOINT -o bundle --target onnxruntime-genai
 *   cc ask.c -I genai/include -L genai/lib -lonnxruntime-genai -o ask
 *   ./ask bundle image.rgb SIZE ROWS IMAGE_ID "BEFORE" "AFTER" [BOS]
 * image.rgb: SIZE x SIZE x 3 bytes, the image prepared as the manifest says; ROWS: that it takes in
 * the prompt; IMAGE_ID: image_token_id of genai_config.json; BEFORE and AFTER: the prompt's text
 * around the image; BOS: id that begins a text, where the tokenizer has one.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <ort_genai_c.h>

enum { MOST_TOKENS = 64 };

static void check(OgaResult* result) {
    if (result == NULL) return;
    fprintf(stderr, "ask: %s\n", OgaResultGetError(result));
    exit(1);
}

static void* allocated(size_t size) {
    void* found = malloc(size);
    if (found == NULL) { fprintf(stderr, "ask: no memory\n"); exit(1); }
    return found;
}

/* Appends the ids of a text; returns how many there are now. */
static size_t append(const OgaTokenizer* tokenizer, const char* text, int32_t** ids, size_t count) {
    OgaSequences* found;
    check(OgaCreateSequences(&found));
    check(OgaTokenizerEncode(tokenizer, text, found));
    size_t more = OgaSequencesGetSequenceCount(found, 0);
    const int32_t* data = OgaSequencesGetSequenceData(found, 0);
    *ids = realloc(*ids, (count + more) * sizeof **ids);
    if (*ids == NULL) { fprintf(stderr, "ask: no memory\n"); exit(1); }
    for (size_t index = 0; index < more; ++index) (*ids)[count + index] = data[index];
    OgaDestroySequences(found);
    return count + more;
}

static void set(OgaNamedTensors* inputs, const char* name, void* data, const int64_t* shape,
                size_t rank, OgaElementType type) {
    OgaTensor* tensor;
    check(OgaCreateTensorFromBuffer(data, shape, rank, type, &tensor));
    check(OgaNamedTensorsSet(inputs, name, tensor));
    OgaDestroyTensor(tensor);
}

int main(int argc, char** argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: ask BUNDLE IMAGE.rgb SIZE ROWS IMAGE_ID BEFORE AFTER [BOS]\n");
        return 2;
    }
    int64_t size = atoll(argv[3]), rows = atoll(argv[4]);
    size_t bytes = (size_t)(size * size * 3);
    uint8_t* pixels = allocated(bytes);
    FILE* file = fopen(argv[2], "rb");
    if (file == NULL || fread(pixels, 1, bytes, file) != bytes) {
        fprintf(stderr, "ask: %s: expected %zu bytes\n", argv[2], bytes);
        return 2;
    }
    fclose(file);

    OgaModel* model;
    OgaTokenizer* tokenizer;
    check(OgaCreateModel(argv[1], &model));
    check(OgaCreateTokenizer(model, &tokenizer));

    int32_t* ids = allocated(sizeof *ids);
    size_t count = 0;
    if (argc > 8) ids[count++] = atoi(argv[8]);
    count = append(tokenizer, argv[6], &ids, count);
    ids = realloc(ids, (count + (size_t)rows) * sizeof *ids);
    if (ids == NULL) { fprintf(stderr, "ask: no memory\n"); return 1; }
    for (int64_t row = 0; row < rows; ++row) ids[count++] = atoi(argv[5]);
    count = append(tokenizer, argv[7], &ids, count);

    OgaNamedTensors* inputs;
    check(OgaCreateNamedTensors(&inputs));
    int64_t length = (int64_t)count;
    set(inputs, "input_ids", ids, (int64_t[]){1, length}, 2, OgaElementType_int32);
    set(inputs, "pixel_values", pixels, (int64_t[]){1, size, size, 3}, 4, OgaElementType_uint8);
    set(inputs, "num_image_tokens", &rows, (int64_t[]){1}, 1, OgaElementType_int64);

    OgaGeneratorParams* settings;
    OgaGenerator* generator;
    OgaTokenizerStream* stream;
    check(OgaCreateGeneratorParams(model, &settings));
    check(OgaGeneratorParamsSetSearchNumber(settings, "max_length", (double)(length + MOST_TOKENS)));
    check(OgaCreateGenerator(model, settings, &generator));
    check(OgaGenerator_SetInputs(generator, inputs));
    check(OgaCreateTokenizerStream(tokenizer, &stream));
    while (!OgaGenerator_IsDone(generator)) {
        const int32_t* token;
        size_t tokens;
        const char* text;
        check(OgaGenerator_GenerateNextToken(generator));
        check(OgaGenerator_GetNextTokens(generator, &token, &tokens));
        if (OgaGenerator_IsDone(generator)) break; /* the token that ends an answer */
        check(OgaTokenizerStreamDecode(stream, token[0], &text));
        printf("%s", text);
        fflush(stdout);
    }
    printf("\n");

    OgaDestroyTokenizerStream(stream);
    OgaDestroyGenerator(generator);
    OgaDestroyGeneratorParams(settings);
    OgaDestroyNamedTensors(inputs);
    OgaDestroyTokenizer(tokenizer);
    OgaDestroyModel(model);
    OgaShutdown();
    free(ids);
    free(pixels);
    return 0;
}
