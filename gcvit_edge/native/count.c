// QEMU plugin: counts the instructions of 64-bit ARM that a program executes, and those that multiply and add in vectors.
//
//   qemu-aarch64 -plugin count.so,out=FILE PROGRAM
//
// At the end FILE has a line "NAME COUNT" for each. The interface is version 1 of qemu-plugin.h (QEMU 6 to 8), of which Debian has
// no package: its declarations are repeated here. Counts are exact for programs of one thread.

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb* block, enum qemu_plugin_op op, void* target, uint64_t value);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void*), void* data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* block);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* block, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn* instruction);

EXPORT int qemu_plugin_version = 1;

// An instruction is one of these if its bits below the mask are these; mask 0 is all. Source: Arm Architecture Reference Manual
// for A-profile, C7.2 (vector and by-element forms; FMLA of float32).
static const struct {
  const char* name;
  uint32_t mask[2], bits[2];
} kinds[] = {
    {"instructions", {0, 0}, {0, 0}},
    {"sdot", {0xBFE0FC00, 0xBFC0F400}, {0x0E809400, 0x0F80E000}},
    {"smmla", {0xFFE0FC00, 0xFFE0FC00}, {0x4E80A400, 0x4E80A400}},
    {"fmla", {0xBFE0FC00, 0xBFC0F400}, {0x0E20CC00, 0x0F801000}},
};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };

static uint64_t counts[KINDS];
static char path[4096];

static void translated(plugin_id id, struct qemu_plugin_tb* block) {
  (void)id;
  uint64_t found[KINDS] = {0};
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof(word));
    for (int kind = 0; kind < KINDS; ++kind) {
      found[kind] += (word & kinds[kind].mask[0]) == kinds[kind].bits[0] || (word & kinds[kind].mask[1]) == kinds[kind].bits[1];
    }
  }
  for (int kind = 0; kind < KINDS; ++kind) {
    if (found[kind] > 0) qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &counts[kind], found[kind]);
  }
}

static void ended(plugin_id id, void* data) {
  (void)id, (void)data;
  FILE* file = fopen(path, "w");
  if (file == NULL) return;
  for (int kind = 0; kind < KINDS; ++kind) fprintf(file, "%s %" PRIu64 "\n", kinds[kind].name, counts[kind]);
  fclose(file);
}

EXPORT int qemu_plugin_install(plugin_id id, const void* info, int count, char** options) {
  (void)info;
  if (count != 1 || strncmp(options[0], "out=", 4) != 0 || strlen(options[0] + 4) >= sizeof(path)) {
    fprintf(stderr, "usage: -plugin count.so,out=FILE\n");
    return -1;
  }
  strcpy(path, options[0] + 4);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
