#include "runtime/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "runtime/error.h"

namespace dllm {

namespace {
struct FileDescriptor {
  int fd;
  explicit FileDescriptor(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd < 0) fail<CheckpointError>("cannot open ", path, ": ", std::strerror(errno));
  }
  ~FileDescriptor() { ::close(fd); }
};

size_t regular_file_size(const FileDescriptor& f, const std::string& path) {
  struct stat st;
  if (::fstat(f.fd, &st) != 0 || !S_ISREG(st.st_mode)) fail<CheckpointError>(path, " is not a regular file");
  return size_t(st.st_size);
}
}  // namespace

MappedFile::MappedFile(const std::string& path) {
  FileDescriptor f(path);
  size_ = regular_file_size(f, path);
  if (size_ == 0) fail<CheckpointError>(path, " is empty");
  void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, f.fd, 0);
  if (p == MAP_FAILED) fail<CheckpointError>("cannot map ", path, " (", size_, " bytes): ", std::strerror(errno));
  data_ = static_cast<uint8_t*>(p);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

void MappedFile::release(const void* begin, size_t bytes) const {
  const auto page = uintptr_t(::sysconf(_SC_PAGESIZE));
  const uintptr_t from = (uintptr_t(begin) + page - 1) / page * page;
  const uintptr_t to = (uintptr_t(begin) + bytes) / page * page;
  if (from < to) ::madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
}

std::string read_text_file(const std::string& path, size_t limit) {
  FileDescriptor f(path);
  const size_t size = regular_file_size(f, path);
  if (size > limit) fail<CheckpointError>(path, " has ", size, " bytes; at most ", limit, " are accepted");
  std::string text(size, '\0');
  size_t got = 0;
  while (got < size) {
    const ssize_t n = ::read(f.fd, text.data() + got, size - got);
    if (n <= 0) fail<CheckpointError>("cannot read ", path);
    got += size_t(n);
  }
  return text;
}

}  // namespace dllm
