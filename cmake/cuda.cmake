# dllm_device: the CUDA backend where it can be built, else what stands in its place.
#
# It is built where torch is a CUDA build and an nvcc of the same major version works with the C++ compiler. nvcc is
# looked for in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and among pip's packages beside torch; TORCH_CUDA_ARCH_LIST
# chooses architectures, written as for torch: "8.0;9.0+PTX". What came of it is said for `dllm info`: DLLM_CUDA
# (Python's True or False) and DLLM_CUDA_REASON (why not, or with what).

# --- nvcc, and reasons not to use it ----------------------------------------------------------------------------------
set(DLLM_CUDA False)
set(DLLM_CUDA_REASON "")
get_filename_component(site_packages ${TORCH_DIR} DIRECTORY)
string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA}")

if(DLLM_SANITIZE OR NOT DLLM_WITH_CUDA)
  set(DLLM_CUDA_REASON "not built: switched off")
elseif(NOT TORCH_CUDA)
  set(DLLM_CUDA_REASON "not built: torch ${TORCH_VERSION} is a CPU build")
elseif(torch_cuda_major LESS 12)
  set(DLLM_CUDA_REASON "not built: torch ${TORCH_VERSION} is for CUDA ${TORCH_CUDA}, and C++20 needs CUDA 12 or newer")
else()
  file(GLOB pip_nvcc ${site_packages}/nvidia/cu${torch_cuda_major}/bin ${site_packages}/nvidia/cuda_nvcc/bin)
  if(DEFINED ENV{CUDACXX})
    set(DLLM_NVCC $ENV{CUDACXX})
  else()
    find_program(DLLM_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin ${pip_nvcc})
  endif()
  if(NOT DLLM_NVCC)
    set(DLLM_CUDA_REASON
        "not built: no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda); torch is for CUDA ${TORCH_CUDA}")
  endif()
endif()

if(NOT DLLM_CUDA_REASON)
  execute_process(COMMAND ${DLLM_NVCC} --version OUTPUT_VARIABLE text ERROR_VARIABLE error RESULT_VARIABLE failed)
  string(REGEX MATCH "V([0-9]+)\\.[0-9.]+" nvcc_version "${text}")
  set(nvcc_major ${CMAKE_MATCH_1})
  string(REPLACE "V" "nvcc " nvcc "${nvcc_version}")
  if(failed OR NOT nvcc_version)
    set(DLLM_CUDA_REASON "not built: ${DLLM_NVCC} --version fails")
  elseif(NOT nvcc_major EQUAL torch_cuda_major)
    set(DLLM_CUDA_REASON
        "not built: ${nvcc} was found, and torch is for CUDA ${TORCH_CUDA}: their first numbers must agree")
  endif()
endif()

# A g++ that is newer than nvcc knows is the usual trouble. (When it is gone, this is tried again.)
if(NOT DLLM_CUDA_REASON AND NOT "${DLLM_NVCC}|${CMAKE_CXX_COMPILER_VERSION}" STREQUAL "${DLLM_NVCC_WORKS}")
  file(WRITE ${CMAKE_BINARY_DIR}/nvcc/works.cu
       "#include <string>\n#include <cuda_bf16.h>\n__global__ void k(float* x) { *x = 1; }\n")
  execute_process(COMMAND ${DLLM_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 -arch=sm_80 -c works.cu -o works.o
                  WORKING_DIRECTORY ${CMAKE_BINARY_DIR}/nvcc
                  OUTPUT_VARIABLE error ERROR_VARIABLE error RESULT_VARIABLE failed)
  if(failed)
    message(WARNING "${error}")
    set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
    set(DLLM_CUDA_REASON "not built: ${nvcc} does not work with ${compiler} (name another in CXX)")
  else()
    set(DLLM_NVCC_WORKS "${DLLM_NVCC}|${CMAKE_CXX_COMPILER_VERSION}" CACHE INTERNAL "nvcc and a compiler it works with")
  endif()
endif()

# Architectures: those of TORCH_CUDA_ARCH_LIST from 8.0 on (cp.async and bf16 begin there), else the usual ones from 8.0
# on that this nvcc knows, and PTX of the newest for the GPUs to come.
if(NOT DLLM_CUDA_REASON)
  set(cuda_archs)
  set(text "$ENV{TORCH_CUDA_ARCH_LIST}")
  string(REGEX REPLACE "[ ,;]+" ";" listed "${text}")
  foreach(item ${listed})
    if(NOT item MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "dllm_ext: TORCH_CUDA_ARCH_LIST = \"${text}\": \"${item}\" is not an architecture such as "
                          "8.0 or 9.0+PTX")
    endif()
    set(arch ${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3})
    if(CMAKE_MATCH_1 GREATER_EQUAL 8)
      list(APPEND cuda_archs ${arch}-real)
      if(CMAKE_MATCH_4)
        list(APPEND cuda_archs ${arch}-virtual)
      endif()
    endif()
  endforeach()
  if(listed AND NOT cuda_archs)
    set(DLLM_CUDA_REASON "not built: TORCH_CUDA_ARCH_LIST = ${text} has nothing from 8.0 on")
  elseif(NOT listed)
    execute_process(COMMAND ${DLLM_NVCC} --list-gpu-code OUTPUT_VARIABLE known)
    foreach(arch 80 86 89 90 100 120)
      if(known MATCHES "sm_${arch}\n")
        list(APPEND cuda_archs ${arch}-real)
        set(newest ${arch})
      endif()
    endforeach()
    list(APPEND cuda_archs ${newest}-virtual)
  endif()
endif()

# Headers and libraries that torch's headers and ours want: the toolkit's and those of torch's packages (nvidia/cu13, or
# one folder for each library). As with torch, commands name the packages through a link.
if(NOT DLLM_CUDA_REASON)
  set(CMAKE_CUDA_COMPILER ${DLLM_NVCC})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES ${cuda_archs})
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked below: torch's own
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  # CMake tries a whole program; pip's nvcc does not know where its own libraries are.
  get_filename_component(folder ${DLLM_NVCC} DIRECTORY)
  set(library_path "$ENV{LIBRARY_PATH}")
  set(ENV{LIBRARY_PATH} "${folder}/../lib:${library_path}")
  enable_language(CUDA)
  set(ENV{LIBRARY_PATH} "${library_path}")
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

  set(cuda_includes ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set(cuda_lib_dirs)
  if(IS_DIRECTORY ${site_packages}/nvidia)
    file(CREATE_LINK ${site_packages}/nvidia ${deps}/nvidia SYMBOLIC)
    file(GLOB packages LIST_DIRECTORIES TRUE ${deps}/nvidia/cu${torch_cuda_major} ${deps}/nvidia/*)
    list(REMOVE_DUPLICATES packages)
    foreach(package ${packages})
      if(IS_DIRECTORY ${package}/include)
        list(APPEND cuda_includes ${package}/include)
      endif()
      if(IS_DIRECTORY ${package}/lib)
        list(APPEND cuda_lib_dirs ${package}/lib)
      endif()
    endforeach()
  endif()
  foreach(header cublas_v2.h cusparse.h cusolverDn.h)
    unset(found)
    find_file(found ${header} PATHS ${cuda_includes} NO_DEFAULT_PATH NO_CACHE)
    if(NOT found)
      set(DLLM_CUDA_REASON "not built: ${header} is neither in CUDA's toolkit nor in a package beside torch")
    endif()
  endforeach()
  set(cuda_libs)
  foreach(lib cudart cublas)
    unset(found)
    find_library(found NAMES lib${lib}.so.${torch_cuda_major} ${lib} NO_CACHE
                 HINTS ${cuda_lib_dirs}
                 PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES})
    if(NOT found)
      set(DLLM_CUDA_REASON "not built: lib${lib} is neither in CUDA's toolkit nor in a package beside torch")
    endif()
    list(APPEND cuda_libs ${found})
  endforeach()
endif()

# --- The backend ------------------------------------------------------------------------------------------------------
set(DLLM_EXECUTABLE_RPATH ${TORCH_DIR}/lib ${SITE_TORCH_LIB})
if(DLLM_CUDA_REASON)
  message(STATUS "CUDA: ${DLLM_CUDA_REASON}")
  add_library(dllm_device OBJECT ${no_cuda_sources})
  target_include_directories(dllm_device PRIVATE csrc)
  return()
endif()
set(DLLM_CUDA True)
string(REPLACE ";" " " archs "${cuda_archs}")
string(REGEX REPLACE "([0-9]+[af]?)-real" "sm_\\1" archs "${archs}")
string(REGEX REPLACE "([0-9]+[af]?)-virtual" "compute_\\1" archs "${archs}")
set(DLLM_CUDA_REASON "${nvcc}, ${archs}")
message(STATUS "CUDA: ${DLLM_CUDA_REASON}")

# Kernels see neither torch nor its headers. .ci/cuda_build forbids spills of registers; with another nvcc a kernel may
# spill a few bytes, and that is no reason not to build. The planning and committing kernels give the CPU's numbers
# to the last bit: there a product and a sum stay two roundings, as in C++.
add_library(dllm_kernels OBJECT ${kernels} csrc/runtime/cuda/probe.cu)
target_include_directories(dllm_kernels PRIVATE csrc)
target_compile_options(dllm_kernels PRIVATE -std=c++20 $<$<BOOL:${DLLM_FORBID_SPILLS}>:-Xptxas=-warn-spills,-Werror>
                                            -Xcompiler=-Wall,-Wextra,-fno-math-errno,-ffp-contract=off)
set(exact_kernels ${kernels})
list(FILTER exact_kernels INCLUDE REGEX "/(cache|decode)/cuda/")
set_source_files_properties(${exact_kernels} PROPERTIES COMPILE_OPTIONS "--fmad=false")

add_library(dllm_device OBJECT ${cuda_sources})
target_include_directories(dllm_device PRIVATE csrc)
target_include_directories(dllm_device SYSTEM PRIVATE ${cuda_includes})
set(sees_torch ${cuda_sources})
list(FILTER sees_torch INCLUDE REGEX "/runtime/cuda/")
set_source_files_properties(${sees_torch} PROPERTIES COMPILE_OPTIONS "-isystem;${deps}/torch_include")
target_sources(dllm_device INTERFACE $<TARGET_OBJECTS:dllm_kernels>)
target_link_libraries(dllm_device INTERFACE ${deps}/torch_lib/libc10_cuda.so ${deps}/torch_lib/libtorch_cuda.so
                                            ${cuda_libs})
foreach(lib ${cuda_libs})
  get_filename_component(folder ${lib} DIRECTORY)
  get_filename_component(folder ${folder} REALPATH)
  list(APPEND DLLM_EXECUTABLE_RPATH ${folder})
endforeach()
list(REMOVE_DUPLICATES DLLM_EXECUTABLE_RPATH)
