/* Stands for the header of onnxruntime-genai's releases, which its wheel leaves out: the functions
 * that examples/c/ask.c calls, as they are in the wheel's library (0.18). */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct OgaResult OgaResult;
typedef struct OgaModel OgaModel;
typedef struct OgaTokenizer OgaTokenizer;
typedef struct OgaTokenizerStream OgaTokenizerStream;
typedef struct OgaSequences OgaSequences;
typedef struct OgaTensor OgaTensor;
typedef struct OgaNamedTensors OgaNamedTensors;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;
/* Numbers of ONNX's TensorProto. */
typedef enum OgaElementType {
    OgaElementType_uint8 = 2,
    OgaElementType_int32 = 6,
    OgaElementType_int64 = 7
} OgaElementType;

const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateModel(const char*, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t, const char**);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char*, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t);
const int32_t* OgaSequencesGetSequenceData(const OgaSequences*, size_t);
OgaResult* OgaCreateTensorFromBuffer(void*, const int64_t*, size_t, OgaElementType, OgaTensor**);
OgaResult* OgaCreateNamedTensors(OgaNamedTensors**);
OgaResult* OgaNamedTensorsSet(OgaNamedTensors*, const char*, OgaTensor*);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char*, double);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_SetInputs(OgaGenerator*, const OgaNamedTensors*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const int32_t**, size_t*);
bool OgaGenerator_IsDone(OgaGenerator*);
void OgaDestroyModel(OgaModel*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyTensor(OgaTensor*);
void OgaDestroyNamedTensors(OgaNamedTensors*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaShutdown(void);
