// The device that make_cuda_device() gives in the emulated build, and what tests may ask of it.
#pragma once

#include "cuda_emulator/stream.h"

namespace dllm::emu {

// How the streams of devices that are made from now on behave.
void set_queue_mode(Queue::Mode mode);

// The stream of the device that was made last; null when that is gone.
Queue* last_queue();

}  // namespace dllm::emu
