/* Runs signatures of a SavedModel through TensorFlow's C API: no Python, no Keras.

   serve_in_c VERSION_DIRECTORY XLA [SIGNATURE INPUT OUTPUT]...

   XLA is "on" or "off"; TensorFlow Serving has it off. INPUT and OUTPUT are files of
   tensors, one after the other: a line "name dtype rank d0 d1 ...", then the raw bytes;
   of strings a line each. Names of inputs and outputs are the signature's; those of the
   graph's tensors are read from its SignatureDef. For a request that fails, OUTPUT is a
   line "! code", then the message. The session does what TensorFlow Serving's does: it
   compares no request with the shapes in the graph. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MOST 64

static void fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

/* Protocol buffers: a message is fields, each a number and a value. */

typedef struct {
  const uint8_t *at, *end;
} Bytes;

static uint64_t varint(Bytes *b) {
  uint64_t value = 0;
  for (int shift = 0; b->at < b->end; shift += 7) {
    uint8_t byte = *b->at++;
    value |= (uint64_t)(byte & 0x7f) << shift;
    if (!(byte & 0x80)) return value;
  }
  fail("SignatureDef", "truncated");
  return 0;
}

/* The next field; its bytes in *value if it has some. Returns its number, 0 at the end. */
static int field(Bytes *b, Bytes *value) {
  if (b->at >= b->end) return 0;
  uint64_t key = varint(b);
  value->at = value->end = b->at;
  switch (key & 7) {
    case 0: varint(b); break;
    case 1: b->at += 8; break;
    case 2: {
      uint64_t size = varint(b);
      value->at = b->at;
      value->end = b->at += size;
      break;
    }
    case 5: b->at += 4; break;
    default: fail("SignatureDef", "unknown wire type");
  }
  return (int)(key >> 3);
}

/* Field `number` of a message; of a map's entry, 1 is the key and 2 the value. */
static Bytes find(Bytes message, int number) {
  Bytes value, found = {0, 0};
  for (int n; (n = field(&message, &value));)
    if (n == number) found = value;
  return found;
}

static int is(Bytes text, const char *other) {
  size_t size = (size_t)(text.end - text.at);
  return size == strlen(other) && !memcmp(text.at, other, size);
}

static Bytes in_map(Bytes message, int number, const char *key) {
  Bytes entry, none = {0, 0};
  for (int n; (n = field(&message, &entry));)
    if (n == number && is(find(entry, 1), key)) return find(entry, 2);
  return none;
}

/* TensorInfo.name, such as "serving_default_x:0". */
static TF_Output tensor(TF_Graph *graph, Bytes info) {
  Bytes name = find(info, 1);
  char text[512] = {0};
  if (name.at == name.end || name.end - name.at >= 512) fail("TensorInfo", "no name");
  memcpy(text, name.at, (size_t)(name.end - name.at));
  char *colon = strrchr(text, ':');
  TF_Output output = {0, colon ? atoi(colon + 1) : 0};
  if (colon) *colon = 0;
  output.oper = TF_GraphOperationByName(graph, text);
  if (!output.oper) fail(text, "not in the graph");
  return output;
}

/* tensorflow::DisableXlaCompilation(), which TensorFlow Serving calls as it starts. */
extern void disable_xla(void) __asm__("_ZN10tensorflow21DisableXlaCompilationEv");

static TF_Tensor *read_tensor(FILE *file, const char *name, TF_DataType dtype,
                              int rank) {
  int64_t dims[8], elements = 1;
  for (int i = 0; i < rank; i++) {
    long long d;
    if (fscanf(file, "%lld", &d) != 1) fail(name, "bad shape");
    dims[i] = d;
    elements *= d;
  }
  fgetc(file); /* the end of the line */
  int strings = dtype == TF_STRING;
  size_t size = strings ? sizeof(TF_TString) : TF_DataTypeSize(dtype);
  size *= (size_t)elements;
  TF_Tensor *t = TF_AllocateTensor(dtype, dims, rank, size);
  if (!strings) {
    if (fread(TF_TensorData(t), 1, size, file) != size) fail(name, "truncated");
    return t;
  }
  TF_TString *string = TF_TensorData(t);
  for (int64_t i = 0; i < elements; i++, string++) {
    char line[256];
    if (!fgets(line, sizeof line, file)) fail(name, "truncated");
    TF_StringInit(string);
    TF_StringCopy(string, line, strcspn(line, "\n"));
  }
  return t;
}

static void run(TF_Session *session, TF_Graph *graph, Bytes signature,
                const char *input, const char *output) {
  TF_Output inputs[MOST], outputs[MOST];
  TF_Tensor *given[MOST], *answers[MOST] = {0};
  char names[MOST][256];
  int inputs_count = 0, outputs_count = 0;

  FILE *file = fopen(input, "rb");
  if (!file) fail(input, "cannot be read");
  char name[256];
  int dtype, rank;
  while (fscanf(file, "%255s %d %d", name, &dtype, &rank) == 3) {
    given[inputs_count] = read_tensor(file, name, (TF_DataType)dtype, rank);
    Bytes info = in_map(signature, 1, name); /* SignatureDef.inputs */
    if (info.at == info.end) fail(name, "no such input");
    inputs[inputs_count++] = tensor(graph, info);
  }
  fclose(file);

  Bytes rest = signature, entry;
  for (int n; (n = field(&rest, &entry));) {
    if (n != 2) continue; /* SignatureDef.outputs */
    Bytes key = find(entry, 1);
    snprintf(names[outputs_count], 256, "%.*s", (int)(key.end - key.at), key.at);
    outputs[outputs_count++] = tensor(graph, find(entry, 2));
  }

  TF_Status *status = TF_NewStatus();
  TF_SessionRun(session, NULL, inputs, given, inputs_count, outputs, answers,
                outputs_count, NULL, 0, NULL, status);

  file = fopen(output, "wb");
  if (!file) fail(output, "cannot be written");
  if (TF_GetCode(status) != TF_OK) {
    fprintf(file, "! %d\n%s", TF_GetCode(status), TF_Message(status));
    outputs_count = 0;
  }
  for (int i = 0; i < outputs_count; i++) {
    TF_Tensor *t = answers[i];
    fprintf(file, "%s %d %d", names[i], TF_TensorType(t), TF_NumDims(t));
    for (int d = 0; d < TF_NumDims(t); d++)
      fprintf(file, " %lld", (long long)TF_Dim(t, d));
    fputc('\n', file);
    fwrite(TF_TensorData(t), 1, TF_TensorByteSize(t), file);
    fputc('\n', file);
  }
  fclose(file);
}

int main(int count, char **arguments) {
  if (count < 3 || count % 3)
    fail("usage", "serve_in_c VERSION_DIRECTORY XLA [SIGNATURE INPUT OUTPUT]...");
  if (!strcmp(arguments[2], "off")) disable_xla();
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  TF_SessionOptions *options = TF_NewSessionOptions();
  TF_Buffer *meta_graph = TF_NewBuffer();
  const char *tags[] = {"serve"};
  TF_Session *session = TF_LoadSessionFromSavedModel(
      options, NULL, arguments[1], tags, 1, graph, meta_graph, status);
  if (TF_GetCode(status) != TF_OK) fail(arguments[1], TF_Message(status));

  const uint8_t *data = meta_graph->data;
  Bytes whole = {data, data + meta_graph->length};
  for (char **request = arguments + 3; request < arguments + count; request += 3) {
    Bytes signature = in_map(whole, 5, request[0]); /* MetaGraphDef.signature_def */
    if (signature.at == signature.end) fail(request[0], "no such signature");
    run(session, graph, signature, request[1], request[2]);
  }
  return 0;
}
