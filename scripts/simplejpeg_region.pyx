# A proposal to simplejpeg (https://github.com/jfolz/simplejpeg): decoding a rectangle of a JPEG, by the region of
# libjpeg-turbo 3. Apply it with: cat simplejpeg_region.pyx >> simplejpeg/_jpeg.pyx
#
# Rows outside of the rectangle are entropy-decoded and skipped, and so are the columns right of it. mmssl would decode
# the random crops of training by it. Checked by Cython 3.3 and a C compiler against these declarations; not built with
# simplejpeg, whose build fetches libjpeg-turbo. docs/log.md has the gain that was measured by ctypes.

cdef extern from "turbojpeg.h" nogil:
    ctypedef struct tjregion:
        int x
        int y
        int w
        int h

    cdef int TJINIT_DECOMPRESS, TJSAMP_UNKNOWN
    cdef int TJPARAM_SUBSAMP, TJPARAM_COLORSPACE
    cdef int TJPARAM_JPEGWIDTH, TJPARAM_JPEGHEIGHT

    cdef const int* tjMCUWidth

    cdef tjhandle tj3Init(int initType)

    cdef void tj3Destroy(tjhandle handle)

    cdef char* tj3GetErrorStr(tjhandle handle)

    cdef int tj3Get(tjhandle handle, int param)

    cdef int tj3DecompressHeader(
        tjhandle handle,
        const unsigned char* jpegBuf,
        size_t jpegSize
    )

    cdef int tj3SetScalingFactor(tjhandle handle, tjscalingfactor factor)

    cdef int tj3SetCroppingRegion(tjhandle handle, tjregion region)

    cdef int tj3Decompress8(
        tjhandle handle,
        const unsigned char* jpegBuf,
        size_t jpegSize,
        unsigned char* dstBuf,
        int pitch,
        int pixelFormat
    )


def decode_jpeg_region(
        const unsigned char[:] data not None,
        int top,
        int left,
        int height,
        int width,
        int reduce=1,
        str colorspace='rgb',
):
    """
    Decode a rectangle of a JPEG (JFIF) string.
    Rows and blocks outside of it are only entropy-decoded.

    :param data: JPEG data
    :param top: first row of the decoded rectangle, in pixels of the
                output of decode_jpeg at the same reduction
    :param left: first column; rounded down to a multiple of the
                 decoded width of an MCU, which widens the rectangle
    :param height: rows to decode
    :param width: columns to decode, before widening
    :param reduce: 1, 2, 4 or 8: decode at this fraction of the size
    :param colorspace: target colorspace, as in decode_jpeg, without CMYK
    :return: image as numpy array, and its first column
    """
    cdef const unsigned char* data_p = &data[0]
    cdef size_t data_len = len(data)
    cdef int pixelformat = PIXELFORMATS[colorspace]
    cdef int retcode = 0
    cdef int full_width, full_height, block
    cdef tjscalingfactor factor
    cdef tjregion region
    cdef tjhandle decoder
    if reduce not in (1, 2, 4, 8):
        raise ValueError('reduce must be 1, 2, 4 or 8')
    if pixelformat == TJPF_CMYK:
        raise ValueError('a region cannot be decoded to CMYK')
    factor.num = 1
    factor.denom = reduce
    decoder = tj3Init(TJINIT_DECOMPRESS)
    if decoder == NULL:
        raise RuntimeError('could not create JPEG decoder')
    try:
        if tj3DecompressHeader(decoder, data_p, data_len) != 0:
            raise ValueError(tj3GetErrorStr(decoder).decode('UTF-8', 'replace'))
        full_width = TJSCALED(tj3Get(decoder, TJPARAM_JPEGWIDTH), factor)
        full_height = TJSCALED(tj3Get(decoder, TJPARAM_JPEGHEIGHT), factor)
        if tj3Get(decoder, TJPARAM_COLORSPACE) in (TJCS_CMYK, TJCS_YCCK):
            raise ValueError('a region of a CMYK JPEG cannot be decoded')
        if tj3Get(decoder, TJPARAM_SUBSAMP) == TJSAMP_UNKNOWN:
            raise ValueError('a region of unusual color subsampling cannot be decoded')
        if not (0 <= top < full_height and 0 < height <= full_height - top
                and 0 <= left < full_width and 0 < width <= full_width - left):
            raise ValueError('the region is not inside of the image')
        # the left edge must lie on an MCU of the reduced image
        block = TJSCALED(tjMCUWidth[tj3Get(decoder, TJPARAM_SUBSAMP)], factor)
        region.x = left - left % block
        region.y = top
        region.w = left + width - region.x
        region.h = height
        if tj3SetScalingFactor(decoder, factor) != 0 \
                or tj3SetCroppingRegion(decoder, region) != 0:
            raise ValueError(tj3GetErrorStr(decoder).decode('UTF-8', 'replace'))
        out = np.empty((region.h, region.w, tjPixelSize[pixelformat]), np.uint8)
        retcode = _decompress_region(decoder, data_p, data_len, out, pixelformat)
        if retcode != 0:
            raise ValueError(tj3GetErrorStr(decoder).decode('UTF-8', 'replace'))
    finally:
        tj3Destroy(decoder)
    return out, region.x


cdef int _decompress_region(
        tjhandle decoder,
        const unsigned char* data_p,
        size_t data_len,
        unsigned char[:, :, ::1] out,
        int pixelformat,
):
    cdef unsigned char* out_p = &out[0, 0, 0]
    cdef int retcode
    with nogil:
        retcode = tj3Decompress8(decoder, data_p, data_len, out_p, 0, pixelformat)
    return retcode
