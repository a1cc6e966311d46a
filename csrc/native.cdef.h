/* What cffi sees, and nothing else. Kept by hand; contracts stand in the headers of each file. */

typedef ... vx_device;
typedef ... vx_pool;
typedef ... vx_nbd_connection;
typedef ... vx_clock;
typedef ... vx_qos;
typedef ... vx_limits;
typedef ... vx_meter;
typedef ... vx_model;
typedef ... vx_scheduler;
typedef ... vx_share;
typedef ... vx_slot;
typedef ... vx_load;

/* Constants: cffi takes their values from the headers, so that nobody else writes them down. */
enum vx_error { VX_E_RANGE, VX_E_IO, VX_E_NOSPACE, VX_E_READONLY, VX_E_POISONED, VX_E_CLOSED,
                VX_E_NOMEM, VX_E_INVALID, VX_E_MISSING_PARENT, VX_E_CANCELLED, VX_E_NO_PROGRESS,
                VX_E_FORKED, VX_E_UNSUPPORTED, VX_E_UPCALL, VX_E_DAMAGED, VX_E_PROTOCOL, ... };
enum vx_operation { VX_READ, VX_WRITE, VX_ZERO, VX_TRIM, VX_FLUSH, VX_EXTENTS, ... };
enum vx_flag { VX_FUA, VX_NOWAIT, VX_NO_HOLE, VX_FAST, VX_ORDER, ... };
enum vx_extent_state { VX_EXTENT_DATA, VX_EXTENT_ZERO, VX_EXTENT_HOLE, ... };
enum vx_fault_kind { VX_FAULT_LOAD, VX_FAULT_GRANT, VX_FAULT_GATE, VX_FAULT_RANGE,
                     VX_FAULT_COMMIT, VX_FAULT_ROW, VX_FAULT_MEMBER, ... };
enum vx_kind { VX_ASK, VX_HOLE, VX_DATA, VX_SHARED, VX_MIXED, VX_STALE, VX_AWAY, ... };
enum vx_map_flag { VX_MAP_IN_PLACE, VX_MAP_READ_ONLY, VX_MAP_GATED, VX_MAP_TRANSPARENT,
                   VX_MAP_COMMITS_BELOW, VX_MAP_IDENTITY, ... };
enum vx_grant_flag { VX_GRANT_FRESH, VX_GRANT_STALE, ... };
enum vx_file_flag { VX_FILE_READ_ONLY, VX_FILE_SPARSE, VX_FILE_MEMORY, VX_FILE_ALLOCATE,
                    VX_FILE_FIXED, ... };
enum vx_model_kind { VX_MODEL_HDD, VX_MODEL_SSD, VX_MODEL_NVME, ... };
enum vx_limit_kind { VX_LIMIT_UNITS, VX_LIMIT_UNITS_READ, VX_LIMIT_UNITS_WRITTEN, VX_LIMIT_BYTES,
                     VX_LIMIT_BYTES_READ, VX_LIMIT_BYTES_WRITTEN, ... };
#define VX_ENTRY_LOWER_SHIFT ...
#define VX_ENTRY_KIND_SHIFT ...
#define VX_ENTRY_TAG_SHIFT ...
#define VX_ENTRY_WATCHED ...
#define VX_CHUNK_PAGES ...
#define VX_TAG_ZERO ...
#define VX_LIMIT_KINDS ...
#define VX_METER_BINS ...
#define VX_DEEPEST ...
#define VX_LARGEST_WEIGHT ...
#define VX_PIECE ...
#define VX_NBD_CONNECTION_BYTES ...
#define VX_LAYOUT_DISKS ...
#define VX_LAYOUT_COLUMNS ...
#define VX_LAYOUT_COPIES ...
#define VX_LAYOUT_BLOCK ...
#define VX_LAYOUT_TIE ...

typedef struct { int32_t code; int32_t os_error; uint32_t operation; uint64_t device;
                 uint64_t offset; ...; } vx_failure;
typedef struct { uint64_t offset; uint64_t length; uint32_t state; int32_t depth; } vx_extent;
typedef struct { uint64_t ns; bool is_virtual; } vx_time;
typedef struct { vx_time time; uint32_t kind; uint32_t operation; uint64_t first; uint64_t count; uint64_t size;
                 const uint64_t *pages; const uint64_t *entries; uint64_t generation;
                 uint64_t bitmap_count; uint64_t bitmap_bytes; const uint64_t *bitmap_pages;
                 const uint8_t *bitmap_bits; uint32_t disk; uint64_t leaf;
                 int32_t code; int32_t os_error;
                 ...; } vx_fault;
typedef struct { uint32_t operation; uint32_t flags; uint64_t offset; uint64_t length;
                 uint8_t *buffer; vx_extent *extents; uint32_t extent_capacity;
                 uint32_t extent_count; int32_t depth; ...; } vx_request;
typedef struct { uint32_t operation; uint64_t offset; uint64_t length; uint8_t *buffer;
                 ...; } vx_step;
typedef struct vx_delegate vx_delegate;
typedef struct { int (*fault)(uint64_t, vx_fault *); int (*perform)(uint64_t, vx_request *);
                 int (*resize)(uint64_t, uint64_t); vx_delegate *delegate; } vx_upcalls;
vx_delegate *vx_delegate_create(uint64_t owner);
void vx_delegate_serve(vx_delegate *delegate);
void vx_delegate_end(vx_delegate *delegate);

extern "Python" int vx_python_fault(uint64_t device, vx_fault *fault);
extern "Python" int vx_python_perform(uint64_t device, vx_request *request);
extern "Python" int vx_python_resize(uint64_t device, uint64_t size);

vx_device *vx_device_reference(vx_device *device);
void vx_device_release(vx_device *device);
uint64_t vx_device_identity(const vx_device *device);
uint64_t vx_device_size(vx_device *device);
int vx_device_resize(vx_device *device, uint64_t size);
int vx_device_state(vx_device *device);
void vx_device_set_state(vx_device *device, int state);
void vx_device_freeze(vx_device *device);

int vx_transfer_at(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                   uint64_t length, uint64_t offset, vx_time *time, vx_failure *failure);
int vx_batch(vx_device *device, vx_step *steps, size_t count, vx_time *time, vx_failure *failure);
int vx_transfer_together(vx_pool *pool, uint32_t count, vx_device *const *devices,
                         uint32_t operation, uint8_t *buffer, uint64_t length,
                         const uint64_t *offsets, vx_time *time, vx_failure *failures);
int64_t vx_list_extents(vx_device *device, uint64_t offset, uint64_t length, vx_extent *extents,
                        uint32_t capacity, vx_failure *failure);

vx_pool *vx_pool_create(uint32_t threads, uint64_t byte_limit, uint32_t level);
void vx_pool_destroy(vx_pool *pool);
uint64_t vx_pool_charged(vx_pool *pool);

vx_device *vx_file_create(int fd, uint64_t size, uint32_t flags, uint64_t identity);
void vx_file_close(vx_device *device);
uint64_t vx_file_barriers(vx_device *device);
vx_device *vx_callback_create(uint64_t size, bool read_only, uint64_t identity,
                              const vx_upcalls *upcalls);
vx_device *vx_memory_create(uint64_t size, uint64_t capacity, uint64_t identity);

typedef struct { uint32_t park_mask; uint64_t park_ns; uint32_t delay_mask; uint64_t delay_ns;
                 uint32_t again_mask; uint32_t fail_mask; uint64_t fail_after;
                 int32_t fail_code; } vx_injector_settings;
vx_device *vx_injector_create(vx_device *lower, vx_pool *pool, uint64_t identity);
void vx_injector_set(vx_device *device, const vx_injector_settings *settings);

typedef struct { uint64_t dirty_generation; uint64_t committed_generation; uint64_t rounds;
                 uint64_t commits; uint64_t dirty_pages; uint64_t granted;
                 uint64_t faults; } vx_map_statistics;
vx_device *vx_map_create(uint64_t size, uint64_t largest_size, uint32_t page_shift,
                         uint32_t lower_count, uint32_t flags, vx_pool *pool, uint64_t identity,
                         const vx_upcalls *upcalls);
int vx_map_set_lower(vx_device *device, uint32_t index, vx_device *lower);
int vx_map_clear_lower(vx_device *device, uint32_t index);
int vx_map_set_parent(vx_device *device, uint32_t lower_index, uint32_t sector_shift,
                      uint32_t mixed_tag, uint32_t full_tag);
int vx_map_install(vx_device *device, uint64_t first, uint64_t count, const uint64_t *entries);
int vx_map_set_bitmap(vx_device *device, uint64_t page, const uint8_t *bits, uint64_t length);
void vx_map_read_entries(vx_device *device, uint64_t first, uint64_t count, uint64_t *entries);
uint64_t vx_map_drop(vx_device *device, uint64_t first_chunk, uint64_t count);
int64_t vx_map_replace(vx_device *device, uint64_t count, const uint64_t *pages,
                       const uint64_t *expected, const uint64_t *entries, bool publish,
                       uint8_t *mismatched);
void vx_map_quiesce(vx_device *device);
void vx_map_track(vx_device *device, uint64_t page);
uint64_t vx_map_take_changes(vx_device *device);
typedef struct { uint16_t random_reads; uint16_t random_writes; uint16_t sequential_reads;
                 uint16_t sequential_writes; } vx_accesses;
int vx_map_count_accesses(vx_device *device, bool on);
void vx_map_take_accesses(vx_device *device, uint64_t first, uint64_t count, vx_accesses *taken);
int vx_map_grant(vx_device *device, uint32_t lower, uint64_t count, const uint64_t *offsets,
                 uint32_t tag, int flag);
uint64_t vx_map_revoke(vx_device *device, uint64_t capacity, uint64_t *offsets);
void vx_map_gate(vx_device *device, bool open);
int vx_map_close(vx_device *device);
void vx_map_statistics_of(vx_device *device, vx_map_statistics *statistics);

typedef struct { uint32_t columns; uint32_t copies; uint64_t interleave; uint64_t slab;
                 uint64_t size; uint64_t largest_size; bool thin; bool delayed; } vx_layout_terms;
typedef struct { uint64_t reads; uint64_t changes; uint64_t failures; uint64_t under_way;
                 uint64_t slowest_ns; } vx_disk_facts;
vx_device *vx_layout_create(const vx_layout_terms *terms, vx_pool *pool, uint64_t identity,
                            const vx_upcalls *upcalls);
int vx_layout_set_disk(vx_device *device, uint32_t disk, vx_device *leaf);
int vx_layout_clear_disk(vx_device *device, uint32_t disk);
int64_t vx_layout_replace(vx_device *device, uint64_t count, const uint64_t *rows,
                          const uint32_t *members, const uint64_t *expected,
                          const uint64_t *entries, uint8_t *mismatched);
void vx_layout_read_entries(vx_device *device, uint64_t first_row, uint64_t count,
                            uint64_t *entries);
int vx_layout_mark(vx_device *device, uint64_t first_row, uint64_t count, bool marked);
int vx_layout_take_changed(vx_device *device, uint64_t first_row, uint64_t count,
                           uint8_t *changed);
void vx_layout_set_moving(vx_device *device, bool moving);
int vx_layout_copy(vx_device *device, uint64_t row, uint32_t from, uint32_t to, uint64_t within,
                   uint64_t length, bool compares, vx_failure *failure);
int vx_layout_compare(vx_device *device, uint64_t row, uint32_t column, uint64_t within,
                      uint64_t length, uint8_t *verdicts, vx_failure *failure);
void vx_layout_close(vx_device *device);
void vx_layout_facts(vx_device *device, uint32_t disk, vx_disk_facts *facts);
void vx_layout_forget_slowest(vx_device *device, uint32_t disk);

vx_device *vx_switch_create(vx_device *lower, vx_pool *pool, uint64_t identity);
void vx_switch_pause(vx_device *device);
void vx_switch_set(vx_device *device, vx_device *lower);
void vx_switch_resume(vx_device *device);
void vx_switch_follow(vx_device *device);

vx_clock *vx_clock_create(bool virtual_time);
void vx_clock_stop(vx_clock *clock);
void vx_clock_destroy(vx_clock *clock);
uint64_t vx_clock_now(vx_clock *clock);
void vx_clock_advance(vx_clock *clock, uint64_t until_ns);
uint64_t vx_clock_next(vx_clock *clock);
vx_clock *vx_pool_clock(vx_pool *pool);

typedef struct { uint64_t rate; uint64_t burst; uint64_t credit; uint64_t credit_rate; } vx_limit;
vx_qos *vx_qos_create(vx_clock *clock, vx_pool *pool);
void vx_qos_destroy(vx_qos *qos);
vx_limits *vx_limits_create(vx_qos *qos, uint32_t unit);
void vx_limits_set(vx_limits *limits, const vx_limit *wanted, bool fresh);
void vx_limits_levels(vx_limits *limits, int64_t *levels);
vx_device *vx_throttle_create(vx_device *lower, vx_qos *qos, vx_limits *own, uint64_t identity);
void vx_throttle_set_group(vx_device *device, vx_limits *group);
void vx_throttle_waiting(vx_device *device, uint64_t *requests, uint64_t *units);

vx_meter *vx_meter_create(uint32_t unit);
void vx_meter_destroy(vx_meter *meter);
void vx_meter_switch(vx_meter *meter, bool on);
typedef struct { uint64_t requests[2]; uint64_t units[2]; uint64_t bytes[2]; uint64_t latency_ns[2];
                 uint64_t queued_ns[2]; uint64_t offered[2]; uint64_t bins[...]; } vx_meter_facts;
void vx_meter_read(vx_meter *meter, vx_meter_facts *facts);
uint64_t vx_meter_bin_start(uint32_t bin);

vx_model *vx_model_create(uint32_t kind, uint64_t capacity, bool write_cache);
void vx_model_destroy(vx_model *model);
uint64_t vx_model_serve(vx_model *model, uint32_t operation, uint64_t offset, uint64_t length,
                        uint64_t now);
uint64_t vx_model_worst(const vx_model *model, uint32_t operation, uint64_t length, uint32_t others);
vx_device *vx_delay_create(vx_device *lower, vx_model *model, vx_clock *clock, uint64_t base,
                           uint64_t identity);

vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model);
void vx_scheduler_set_most_below(vx_scheduler *scheduler, uint64_t ns);
void vx_scheduler_stop(vx_scheduler *scheduler);
void vx_scheduler_release(vx_scheduler *scheduler);
typedef struct { uint64_t contended_ns; uint64_t contended_units; uint64_t waiting;
                 uint64_t below; } vx_scheduler_facts;
void vx_scheduler_read(vx_scheduler *scheduler, vx_scheduler_facts *facts);
vx_share *vx_share_create(vx_scheduler *scheduler);
void vx_share_set(vx_share *share, uint64_t reservation, uint64_t limit, uint64_t weight);
typedef struct { uint64_t requests; uint64_t units; uint64_t reserved_units; uint64_t waiting;
                 uint64_t waiting_units; uint64_t waited_ns; uint64_t below;
                 uint64_t late_ns; } vx_share_facts;
void vx_share_read(vx_share *share, vx_share_facts *facts);
vx_device *vx_schedule_create(vx_device *lower, vx_share *share, uint64_t identity);
uint64_t vx_schedule_waiting(vx_device *device);
void vx_schedule_set_share(vx_device *device, vx_share *share);
vx_slot *vx_share_take_slot(vx_share *share, uint64_t bytes);
void vx_slot_end(vx_slot *slot);

typedef struct { uint64_t first; uint64_t span; uint64_t length; uint64_t least; uint64_t pause_ns;
                 uint32_t depth; uint32_t write_percent; bool flushes;
                 bool in_a_row; uint64_t seed; } vx_load_terms;
vx_load *vx_load_create(vx_device *device, vx_clock *clock, vx_pool *pool, vx_meter *meter,
                        const vx_load_terms *terms);
void vx_load_start(vx_load *load);
void vx_load_stop(vx_load *load);
typedef struct { uint64_t answered; uint64_t failed; uint64_t under_way; } vx_load_facts;
void vx_load_read(vx_load *load, vx_load_facts *facts);
void vx_load_destroy(vx_load *load);

typedef struct { uint32_t largest_payload; uint32_t context_id; uint32_t requests_limit;
                 uint32_t epoch_slot; uint64_t bytes_limit; bool read_only; bool structured;
                 bool block_status; } vx_nbd_terms;
vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length);
void vx_nbd_set_meter(vx_nbd_connection *connection, vx_meter *meter);
int vx_nbd_serve(vx_nbd_connection *connection);
void vx_nbd_stop(vx_nbd_connection *connection);
void vx_nbd_abort(vx_nbd_connection *connection);
typedef struct { uint64_t requests[8]; uint64_t bytes_read; uint64_t bytes_written; uint64_t errors;
                 uint64_t failed_writes; uint64_t pooled; uint64_t under_way; } vx_nbd_counters;
void vx_nbd_counters_of(vx_nbd_connection *connection, vx_nbd_counters *counters);
void vx_nbd_destroy(vx_nbd_connection *connection);
